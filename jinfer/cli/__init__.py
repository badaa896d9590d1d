"""Commands of `jinfer`, one module each: SUMMARY, add_arguments(parser), run(args)."""
