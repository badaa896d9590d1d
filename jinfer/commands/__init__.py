"""One module a subcommand of `jinfer`: SUMMARY, add_arguments(parser), run(args)."""
