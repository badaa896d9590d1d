"""The rules of docs/explanation/architecture.md: the folder is the floor, imports go down only."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("pallas_kernels", "jinfer")
MAX_DEPTH = 4  # jinfer/engine/pages/pool.py: two levels of folders in the package

# Floors, lowest first: a module imports from its own folder and from the floors below. Names on one
# line are neighbours, which do not import each other. `jinfer` is the facade of public names.
FLOORS = (
    ("pallas_kernels",),
    ("config",),
    ("text", "sampling", "kv", "linear"),
    ("models",),
    ("checkpoints",),
    ("speculation",),
    ("quant",),
    ("functional",),
    ("steps",),
    ("engine",),
    ("training", "requests", "setup"),
    ("llm",),
    ("jobs",),
    ("cli",),
    ("__main__",),
)
HEIGHT = {name: height for height, names in enumerate(FLOORS) for name in names}
ROOT_MODULES = {"__init__", "__main__", "functional", "llm"}
# Folders that decide on the host and are tested in milliseconds; and modules of mixed folders.
WITHOUT_JAX = (
    "jinfer.config",
    "jinfer.text",
    "jinfer.engine.pages",
    "jinfer.engine.drafting",
    "jinfer.engine.safety",
    "jinfer.engine.plan",
    "jinfer.engine.queue",
    "jinfer.engine.request",
    "jinfer.engine.scheduler",
    "jinfer.engine.beam.hypotheses",
    "jinfer.jobs",
    "jinfer.cli",
    "jinfer.checkpoints.hf_config",
    "jinfer.speculation.adaptive",
    "jinfer.speculation.lookahead",
    "jinfer.speculation.medusa_tree",
    "jinfer.speculation.ngram",
    "jinfer.speculation.trees",
)
# One jit boundary; calibration compiles its own solvers, one program a weight shape, and training
# its own step.
MAY_JIT = ("jinfer/steps/", "jinfer/quant/", "jinfer/training/")
KERNELS_MAY_IMPORT = {"jax", "jaxlib", "numpy", "ml_dtypes", "jaxtyping", "pallas_kernels"}
MAX_LINES, MAX_PARAMETERS = 60, 8
# Functions past these limits: {name: reason}. An entry that no longer needs to be here fails, too.
KERNEL = "a kernel, or what prepares its operands: one unit of work with the device"
SIGNATURE = "a public signature, called by keyword; a dataclass would only hide the arguments"
TOO_LONG = {
    "pallas_kernels.paged_attention.mosaic_gpu_kernel._copy_role": KERNEL,
    "pallas_kernels.paged_attention.mosaic_gpu_kernel._attend_role": KERNEL,
    "pallas_kernels.paged_attention.mosaic_tpu._attend_tiles": KERNEL,
    "pallas_kernels.paged_attention.mosaic_tpu._kernel": KERNEL,
    "pallas_kernels.quant_matmul.mosaic_gpu_kernel.persistent_matmul": KERNEL,
    "pallas_kernels.quant_matmul.mosaic_gpu_kernel.persistent_matmul.kernel": KERNEL,
    "pallas_kernels.quant_matmul.mosaic_gpu_kernel.persistent_matmul.kernel.compute": KERNEL,
    "pallas_kernels.quant_matmul.mosaic_tpu.block_matmul": KERNEL,
}
TOO_WIDE = {
    "pallas_kernels.paged_attention.mosaic_gpu._run_tiles": KERNEL,
    "pallas_kernels.paged_attention.mosaic_gpu_kernel._kernel": KERNEL,
    "pallas_kernels.paged_attention.mosaic_tpu._run_tiles": KERNEL,
    "pallas_kernels.quant_matmul.mosaic_gpu_kernel.persistent_matmul": KERNEL,
    "pallas_kernels.fp8_matmul.fp8_matmul": SIGNATURE,
    "pallas_kernels.paged_attention.ragged_paged_attention": SIGNATURE,
    "pallas_kernels.quant_matmul.quant_matmul": SIGNATURE,
    "jinfer.functional.generate": SIGNATURE,
    "jinfer.llm.LLM.__init__": SIGNATURE,
    "jinfer.llm.LLM.chat": SIGNATURE,
    "jinfer.quant.methods.gptq.quantize_gptq": SIGNATURE,
}
TOP_LEVEL = {
    *(".ci", ".gitignore", ".pre-commit-config.yaml", "mkdocs.yml", "pyproject.toml"),
    *("CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "README.md"),
    *("benchmarks", "docs", "examples", "jinfer", "pallas_kernels", "scripts", "tests"),
}


def module_files(root: Path) -> dict[str, Path]:
    """Returns {dotted module name: file} of both packages."""
    files = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


def walk(node: ast.AST, *, inside_functions: bool) -> Iterator[ast.AST]:
    """Yields the nodes below, without those in functions and TYPE_CHECKING blocks unless asked."""
    for child in ast.iter_child_nodes(node):
        is_function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        is_typing = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
        if inside_functions or not (is_function or is_typing):
            yield child
            yield from walk(child, inside_functions=inside_functions)


def imports(path: Path, modules: dict[str, Path], *, inside_functions: bool = True) -> set[str]:
    """Returns the modules that a file imports, ours by their full name."""
    found = set()
    for node in walk(ast.parse(path.read_text()), inside_functions=inside_functions):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            submodules = names & modules.keys()
            found |= submodules
            if submodules != names:
                found.add(node.module)
    return found


def folder(module: str) -> str:
    """Returns which entry of FLOORS a module belongs to: its folder, or its name in the root."""
    package, _, rest = module.partition(".")
    return package if package != "jinfer" else rest.partition(".")[0]


def private_reads(root: Path) -> list[str]:
    """Returns one sentence for each private attribute of an engine that a test or bench reads.

    An engine is what is called `llm` or `..._llm`, what `LLM` or `AsyncLLM` makes, everything that
    is reached through one (`llm.loop.engine`), and names that are assigned any of these.
    """
    sentences = []
    folders = ("tests", "scripts", "examples", "benchmarks", "jinfer/cli")
    for path in sorted(path for name in folders for path in (root / name).rglob("*.py")):
        tree = ast.parse(path.read_text())
        names: set[str] = set()
        for node in ast.walk(tree):  # outer names come before those made of them
            if isinstance(node, ast.Assign) and reaches_engine(node.value, names):
                names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        for node in ast.walk(tree):
            is_private = isinstance(node, ast.Attribute) and re.match("_[^_]", node.attr)
            if is_private and reaches_engine(node.value, names):
                here = path.relative_to(root)
                sentences.append(f"{here}:{node.lineno} reads {ast.unparse(node)}")
    return sentences


def reaches_engine(node: ast.AST, names: set[str]) -> bool:
    """Whether an expression is an engine, or a chain of attributes that begins at one."""
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in ("LLM", "AsyncLLM")
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        if isinstance(node, ast.Attribute) and re.fullmatch(r"(\w+_)?llm", node.attr):
            return True
        node = node.value
    return isinstance(node, ast.Name) and (
        node.id in names or re.fullmatch(r"(\w+_)?llm", node.id) is not None
    )


def floor_violations(root: Path) -> list[str]:
    """Returns one sentence for each import that goes up and each module without a floor."""
    modules, sentences = module_files(root), []
    for module, path in modules.items():
        here, own = path.relative_to(root), folder(module)
        if module == "jinfer":
            continue
        if own not in HEIGHT:
            sentences.append(f"{here} has no floor; give its folder one in tests/test_house.py")
            continue
        for name in sorted(imports(path, modules) - {"jinfer"}):
            if name.split(".")[0] not in PACKAGES:
                continue
            if name not in modules:
                sentences.append(f"{here} imports {name}, which does not exist")
                continue
            other = folder(name)
            if other != own and HEIGHT.get(other, -1) >= HEIGHT[own]:
                there = modules[name].relative_to(root)
                sentences.append(f"{here} imports {there}, which does not lie below it")
    return sentences


def find_circle(root: Path) -> list[str]:
    """Returns modules that import each other in a ring, or an empty list.

    Imports in functions and for type checkers count, too. The facade `jinfer` does not: it imports
    only when a name is used.
    """
    modules = module_files(root)
    graph = {
        module: imports(path, modules) & modules.keys() - {module, "jinfer"}
        for module, path in modules.items()
        if module != "jinfer"
    }
    done: set[str] = set()

    def visit(module: str, trail: list[str]) -> list[str]:
        if module in trail:
            return [*trail[trail.index(module) :], module]
        if module not in done:
            for name in sorted(graph[module]):
                if circle := visit(name, [*trail, module]):
                    return circle
            done.add(module)
        return []

    return next((circle for module in graph if (circle := visit(module, []))), [])


def jit_violations(root: Path) -> list[str]:
    """Returns one sentence for each use of jit or pjit in jinfer outside its place."""
    sentences = []
    for path in module_files(root).values():
        here = path.relative_to(root).as_posix()
        if not here.startswith("jinfer/") or here.startswith(MAY_JIT):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            is_jit = isinstance(node, ast.Attribute) and node.attr in ("jit", "pjit")
            is_import = isinstance(node, ast.ImportFrom) and any(
                alias.name in ("jit", "pjit") for alias in node.names
            )
            if is_jit or is_import:
                sentences.append(f"{here}:{node.lineno} says jit; jinfer/steps is the place for it")
    return sentences


def function_sizes(root: Path) -> dict[str, tuple[int, int]]:
    """Returns {dotted name: (lines, parameters)} of each function, nested ones included.

    Lines run from `def` to the last statement, without the docstring. `*args` and `**options` count
    as one parameter each, `self` and `cls` do not count.
    """
    sizes: dict[str, tuple[int, int]] = {}

    def visit(node: ast.AST, name: str):
        for child in ast.iter_child_nodes(node):
            is_function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))
            is_named = is_function or isinstance(child, ast.ClassDef)
            child_name = f"{name}.{child.name}" if is_named else name
            if is_function:
                lines = child.end_lineno - child.lineno + 1
                if ast.get_docstring(child):
                    lines -= child.body[0].end_lineno - child.body[0].lineno + 1
                every = child.args
                listed = [*every.posonlyargs, *every.args, every.vararg, *every.kwonlyargs]
                names = [argument.arg for argument in [*listed, every.kwarg] if argument]
                sizes[child_name] = (lines, len(names) - (names[:1] in (["self"], ["cls"])))
            visit(child, child_name)

    for module, path in module_files(root).items():
        visit(ast.parse(path.read_text()), module)
    return sizes


def limit_violations(
    root: Path, too_long: dict[str, str], too_wide: dict[str, str]
) -> tuple[list[str], list[str]]:
    """Returns the functions over a limit with their reasons, and one sentence for each fault.

    A fault is a function over a limit without an exception, or an exception without need.
    """
    sizes = function_sizes(root)
    listing, faults = [], []
    for i, limit, noun, table, remedy in (
        (0, MAX_LINES, "lines", too_long, "give its phases names"),
        (1, MAX_PARAMETERS, "parameters", too_wide, "group them in a dataclass"),
    ):
        over = {name: size[i] for name, size in sizes.items() if size[i] > limit}
        listing.append(f"functions past {limit} {noun}: {len(over)}")
        for name, size in over.items():
            listing.append(f"  {name}: {size}: {table.get(name, 'not named')}")
            if name not in table:
                faults.append(f"{name} has {size} {noun}, at most {limit} are allowed; {remedy}")
        for name in table.keys() - over.keys():
            faults.append(f"{name} has at most {limit} {noun}; remove it from tests/test_house.py")
    return listing, faults


def test_imports_go_down_only():
    sentences = floor_violations(ROOT)
    print("\nfloors: " + " < ".join(", ".join(names) for names in FLOORS))
    print(f"upward imports: {len(sentences)}")
    assert not sentences


def test_no_imports_run_in_a_circle():
    circle = find_circle(ROOT)
    print(f"\ncircles: {int(bool(circle))}")
    assert not circle


def test_the_root_of_jinfer_holds_few_modules():
    names = {path.stem for path in (ROOT / "jinfer").glob("*.py")}
    print(f"\nroot modules: {len(names)}: {', '.join(sorted(names))}")
    assert names == ROOT_MODULES


def test_only_steps_says_jit():
    assert not jit_violations(ROOT)


def test_functions_are_short_and_take_few_parameters():
    listing, faults = limit_violations(ROOT, TOO_LONG, TOO_WIDE)
    print("\n" + "\n".join(listing))
    assert not faults


@pytest.fixture
def house(tmp_path):
    """A small house to break rules in."""

    def build(**files):
        for name, text in files.items():
            path = tmp_path / f"{name.replace('__', '/')}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path

    return build


@pytest.mark.parametrize(
    "text",
    [
        "from jinfer.models.model import Model",
        "from jinfer.models import model",
        "import jinfer.models.model",
        "def lazily():\n    from jinfer.models import model",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import jinfer.models.model",
    ],
)
def test_an_upward_import_is_a_sentence(house, text):
    root = house(jinfer__linear__ops=text, jinfer__models__model="Model = 1")
    assert floor_violations(root) == [
        "jinfer/linear/ops.py imports jinfer/models/model.py, which does not lie below it"
    ]


def test_other_faults_of_imports_are_sentences_too(house):
    root = house(
        jinfer__kv__cache="import jinfer.linear.ops",
        jinfer__linear__ops="import jinfer.linear.nothing",
        jinfer__engine__pages__pool="from jinfer.engine import plan",
        jinfer__engine__plan="def lazily():\n    import jinfer.engine.pages.pool",
        jinfer__new="",
        pallas_kernels__tiles="import jinfer.config.model",
        jinfer__config__model="",
        jinfer__cli__main="import jax\nf = jax.jit(abs)",
    )
    assert floor_violations(root) == [
        "pallas_kernels/tiles.py imports jinfer/config/model.py, which does not lie below it",
        "jinfer/kv/cache.py imports jinfer/linear/ops.py, which does not lie below it",
        "jinfer/linear/ops.py imports jinfer.linear.nothing, which does not exist",
        "jinfer/new.py has no floor; give its folder one in tests/test_house.py",
    ]
    pool, plan = "jinfer.engine.pages.pool", "jinfer.engine.plan"
    assert find_circle(root) == [pool, plan, pool]
    assert jit_violations(root) == [
        "jinfer/cli/main.py:2 says jit; jinfer/steps is the place for it"
    ]


def test_a_long_or_wide_function_is_a_sentence(house):
    body = '    """Does it."""\n' + "    x = 1\n" * (MAX_LINES - 1)
    many = ", ".join(f"p{i}" for i in range(MAX_PARAMETERS))
    wide = f"def wide(p, {many}):\n    pass\n"
    method = f"class Box:\n    def put(self, {many}):\n        pass\n"
    root = house(
        jinfer__kv__cache=f"def fits():\n{body}def long():\n{body}    x = 2\n",
        jinfer__linear__ops=wide + method,
        pallas_kernels__tiles=f"def outer():\n    def inner({many}, **q):\n        pass\n",
    )
    named = {"jinfer.linear.ops.wide": "a reason", "jinfer.linear.ops.Box.put": "no reason"}
    listing, faults = limit_violations(root, {"jinfer.kv.cache.fits": "no reason"}, named)
    assert faults == [
        "jinfer.kv.cache.long has 61 lines, at most 60 are allowed; give its phases names",
        "jinfer.kv.cache.fits has at most 60 lines; remove it from tests/test_house.py",
        "pallas_kernels.tiles.outer.inner has 9 parameters, at most 8 are allowed; "
        "group them in a dataclass",
        "jinfer.linear.ops.Box.put has at most 8 parameters; remove it from tests/test_house.py",
    ]
    assert listing == [
        "functions past 60 lines: 1",
        "  jinfer.kv.cache.long: 61: not named",
        "functions past 8 parameters: 2",
        "  pallas_kernels.tiles.outer.inner: 9: not named",
        "  jinfer.linear.ops.wide: 9: a reason",
    ]


def test_a_private_read_of_an_engine_is_a_sentence(house):
    text = "engine = AsyncLLM('m')\nloop = engine.llm.loop\nother = make()\n"
    text += "loop.engine._step\nother._mine\nself.my_llm.loop._inbox[0]\nengine.llm.__dict__\n"
    root = house(tests__test_it=text, jinfer__cli__run="llm._x = 1", jinfer__llm="self.llm._x")
    assert private_reads(root) == [
        "jinfer/cli/run.py:1 reads llm._x",
        "tests/test_it.py:4 reads loop.engine._step",
        "tests/test_it.py:6 reads self.my_llm.loop._inbox",
    ]


def test_kernels_stand_alone():
    modules = module_files(ROOT)
    for module, path in modules.items():
        if module.startswith("pallas_kernels"):
            names = {name.split(".")[0] for name in imports(path, modules)}
            foreign = names - KERNELS_MAY_IMPORT - sys.stdlib_module_names
            assert not foreign, f"{path.relative_to(ROOT)} imports {foreign}"


def test_private_jax_stays_in_compat():
    modules = module_files(ROOT)
    for path in modules.values():
        is_private = any(name.startswith("jax._src") for name in imports(path, modules))
        assert not is_private or path == ROOT / "pallas_kernels/compat.py", path


def test_the_host_side_imports_no_jax():
    modules = module_files(ROOT)
    for start in modules:
        if not start.startswith(WITHOUT_JAX):
            continue
        seen, todo = set(), [start]
        while todo:
            module = todo.pop()
            seen.add(module)
            # The facade jinfer/__init__.py is loaded by everything and counts for nothing here.
            for name in imports(modules[module], modules, inside_functions=False) - {"jinfer"}:
                assert name.split(".")[0] not in ("jax", "flax"), (
                    f"{start}: {module} imports {name}"
                )
                if name in modules and name not in seen:
                    todo.append(name)


def test_folders_stay_shallow():
    for path in module_files(ROOT).values():
        here = path.relative_to(ROOT)
        assert len(here.parts) <= MAX_DEPTH, f"{here} lies deeper than two folders in its package"


def test_no_unfinished_business():
    for path in module_files(ROOT).values():
        for number, line in enumerate(path.read_text().splitlines(), 1):
            where = f"{path.relative_to(ROOT)}:{number}"
            assert not any(word in line for word in ("TODO", "FIXME", "XXX")), where


def test_the_top_level_holds_what_it_should():
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    assert {line.split("/")[0] for line in listed.stdout.splitlines()} <= TOP_LEVEL


LIGHT = """
import sys, time
begin = time.process_time()
import jinfer
seconds = time.process_time() - begin
heavy = sorted({"torch", "transformers", "huggingface_hub", "gguf"} & set(sys.modules))
xla_bridge = sys.modules.get("jax._src.xla_bridge")
print(bool(xla_bridge) and xla_bridge.backends_are_initialized(), heavy, seconds)
"""


def test_import_jinfer_is_light():
    """No backend, no torch, and well under two seconds (of the process's own time: load varies)."""
    best = float("inf")
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", LIGHT], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        has_backend, *heavy, seconds = done.stdout.split()
        assert (has_backend, "".join(heavy)) == ("False", "[]")
        best = min(best, float(seconds))
        if best < 2:
            break
    assert best < 2


def test_tests_and_benches_read_no_private_member_of_an_engine():
    assert private_reads(ROOT) == []
