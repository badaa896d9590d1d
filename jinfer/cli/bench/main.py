"""`jinfer bench NAME`: runs one measurement; each is a module of this folder."""

from __future__ import annotations

import argparse
import inspect
from typing import Any

from jinfer.cli.bench import beam as bench_beam
from jinfer.cli.bench import kv as bench_kv
from jinfer.cli.bench import latency as bench_latency
from jinfer.cli.bench import prefix as bench_prefix
from jinfer.cli.bench import soak as bench_soak
from jinfer.cli.bench import spec as bench_spec
from jinfer.cli.bench.report import add_json_argument
from jinfer.cli.flags import check_result_file

SUMMARY = "measure a part of the engine against a reference"
BENCHES: dict[str, Any] = {
    "beam": bench_beam,
    "kv": bench_kv,
    "latency": bench_latency,
    "prefix": bench_prefix,
    "soak": bench_soak,
    "spec": bench_spec,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares a subcommand for each bench."""
    benches = parser.add_subparsers(required=True, metavar="BENCH")
    for name, module in BENCHES.items():
        bench = benches.add_parser(
            name,
            help=module.SUMMARY,
            description=inspect.getdoc(module.run),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(bench)
        add_json_argument(bench)
        bench.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks"
        )
        bench.set_defaults(run_bench=module.run)


def run(args: argparse.Namespace) -> int:
    """Runs one bench; prints its rows, and writes them with --json for `docs/lab/benchmarks.md`."""
    check_result_file(args.json)
    return args.run_bench(args)
