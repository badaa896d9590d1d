"""The rules of docs/architecture.md: imports go down only, files stay small, import stays light."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("pallas_kernels", "jinfer")
MAX_LINES = {"jinfer": 450, "pallas_kernels": 500}

# Floors, lowest first: a module imports from its own floor and below. A package stands for all its
# modules unless one of them is named.
FLOORS = {
    "pallas_kernels": -1,
    "jinfer.beam_params": 0,
    "jinfer.config": 0,
    "jinfer.fields": 0,
    "jinfer.memory": 0,
    "jinfer.outputs": 0,
    "jinfer.qformat": 0,
    "jinfer.qtensor": 0,
    "jinfer.refusals": 0,
    "jinfer.sampling_params": 0,
    "jinfer.static_kv": 0,
    "jinfer.tracing": 0,
    "jinfer.typing": 0,
    "jinfer.batch": 1,
    "jinfer.formats": 1,
    "jinfer.kv_cache": 1,
    "jinfer.kv_quant": 1,
    "jinfer.ops": 1,
    "jinfer.parallel": 1,
    "jinfer.qkernels": 1,
    "jinfer.qlayout": 1,
    "jinfer.qlinear": 1,
    "jinfer.models": 2,
    "jinfer.params": 2,
    "jinfer.quant": 3,
    "jinfer.sampler_state": 3,
    "jinfer.sampling": 3,
    "jinfer.spec": 3,
    "jinfer.weights": 3,
    "jinfer.functional": 4,
    "jinfer.draft_steps": 4,
    "jinfer.gguf_vocabulary": 4,
    "jinfer.steps": 4,
    "jinfer.tree_steps": 4,
    "jinfer.tokenizer": 4,
    "jinfer.engine": 5,
    "jinfer.beam_search": 6,
    "jinfer.build": 6,
    "jinfer.conversations": 6,
    "jinfer.drafting": 6,
    "jinfer.groups": 6,
    "jinfer.llm": 6,
    "jinfer.llm_options": 6,
    "jinfer.prompts": 6,
    "jinfer": 6,  # the public names
    "jinfer.__main__": 7,
    "jinfer.cli": 7,
    "jinfer.commands": 7,
    "jinfer.jsonl": 7,
    "jinfer.server": 7,
}
# These decide on the host and must be testable in milliseconds.
WITHOUT_JAX = (
    "jinfer.beam_params",
    "jinfer.commands",
    "jinfer.config",
    "jinfer.static_kv",
    "jinfer.engine.costs",
    "jinfer.engine.detokenizer",
    "jinfer.engine.fed_pages",
    "jinfer.engine.grammar",
    "jinfer.engine.holdings",
    "jinfer.engine.host_tier",
    "jinfer.engine.hypotheses",
    "jinfer.engine.integrity",
    "jinfer.engine.pages",
    "jinfer.engine.plan",
    "jinfer.engine.prefix",
    "jinfer.engine.proposers",
    "jinfer.engine.queue",
    "jinfer.engine.radix",
    "jinfer.engine.recovery",
    "jinfer.engine.request",
    "jinfer.engine.scheduler",
    "jinfer.engine.watchdog",
    "jinfer.engine.speculation",
    "jinfer.engine.tree_speculation",
    "jinfer.fields",
    "jinfer.jsonl",
    "jinfer.memory",
    "jinfer.models.hf_config",
    "jinfer.outputs",
    "jinfer.refusals",
    "jinfer.sampling_params",
    "jinfer.spec.adaptive",
    "jinfer.spec.lookahead",
    "jinfer.spec.medusa_tree",
    "jinfer.spec.ngram",
    "jinfer.spec.draft_tree",
)
# One jit boundary; calibration compiles its own solvers, one program a weight shape, and training
# its own step.
MAY_JIT = (
    "jinfer/steps.py",
    "jinfer/draft_steps.py",
    "jinfer/tree_steps.py",
    "jinfer/quant/",
    "jinfer/spec/draft_training.py",
    "jinfer/spec/medusa_training.py",
    "jinfer/spec/training.py",
)
KERNELS_MAY_IMPORT = {"jax", "jaxlib", "numpy", "ml_dtypes", "jaxtyping", "pallas_kernels"}
TOP_LEVEL = {
    *(".ci", ".gitignore", "CHANGELOG.md", "LICENSE", "README.md", "pyproject.toml"),
    *("benchmarks", "docs", "jinfer", "pallas_kernels", "scripts", "tests"),
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


def floor(module: str) -> int | None:
    """Returns the floor of a module of ours, or None if it has none."""
    if module in FLOORS:
        return FLOORS[module]
    package = module.rpartition(".")[0]
    return floor(package) if package not in ("", "jinfer") else None


def floor_violations(root: Path) -> list[str]:
    """Returns one sentence for each import that goes up and each module without a floor."""
    modules, sentences = module_files(root), []
    for module, path in modules.items():
        here = path.relative_to(root)
        height = floor(module)
        if height is None:
            sentences.append(f"{here} has no floor; give it one in tests/test_house.py")
            continue
        for name in sorted(imports(path, modules)):
            if name.split(".")[0] not in PACKAGES:
                continue
            if name not in modules:
                sentences.append(f"{here} imports {name}, which does not exist")
                continue
            other = floor(name)
            if other is not None and other > height:
                there = modules[name].relative_to(root)
                sentences.append(f"{here} (floor {height}) imports {there} (floor {other})")
    return sentences


def find_cycle(root: Path) -> list[str]:
    """Returns modules that need each other in a ring in order to load, or an empty list."""
    modules = module_files(root)
    graph = {
        module: imports(path, modules, inside_functions=False) & modules.keys() - {module}
        for module, path in modules.items()
    }
    done: set[str] = set()

    def visit(module: str, trail: list[str]) -> list[str]:
        if module in trail:
            return [*trail[trail.index(module) :], module]
        if module not in done:
            for name in sorted(graph[module]):
                if cycle := visit(name, [*trail, module]):
                    return cycle
            done.add(module)
        return []

    return next((cycle for module in graph if (cycle := visit(module, []))), [])


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
                sentences.append(f"{here}:{node.lineno} says jit; steps.py is the place for it")
    return sentences


def test_imports_go_down_only():
    assert not floor_violations(ROOT)


def test_there_are_no_import_cycles():
    assert not find_cycle(ROOT)


def test_only_steps_says_jit():
    assert not jit_violations(ROOT)


@pytest.fixture
def house(tmp_path):
    """A small house to break rules in."""

    def build(**files):
        for name in ("jinfer", "jinfer/models", "pallas_kernels"):
            (tmp_path / name).mkdir(parents=True)
            (tmp_path / name / "__init__.py").touch()
        for name, text in files.items():
            (tmp_path / f"{name.replace('__', '/')}.py").write_text(text)
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
    root = house(jinfer__ops=text, jinfer__models__model="Model = 1")
    assert floor_violations(root) == [
        "jinfer/ops.py (floor 1) imports jinfer/models/model.py (floor 2)"
    ]


def test_other_faults_of_imports_are_sentences_too(house):
    root = house(
        jinfer__batch="import jinfer.cli",
        jinfer__new="",
        jinfer__steps="import jinfer.functional",
        jinfer__functional="from jinfer import steps",
        pallas_kernels__tiles="import jinfer.config",
        jinfer__config="",
        jinfer__cli="import jax\nf = jax.jit(abs)",
    )
    assert floor_violations(root) == [
        "pallas_kernels/tiles.py (floor -1) imports jinfer/config.py (floor 0)",
        "jinfer/batch.py (floor 1) imports jinfer/cli.py (floor 7)",
        "jinfer/new.py has no floor; give it one in tests/test_house.py",
    ]
    assert find_cycle(root) == ["jinfer.functional", "jinfer.steps", "jinfer.functional"]
    assert jit_violations(root) == ["jinfer/cli.py:2 says jit; steps.py is the place for it"]


def test_kernels_stand_alone():
    modules = module_files(ROOT)
    for module, path in modules.items():
        if module.startswith("pallas_kernels"):
            names = {name.split(".")[0] for name in imports(path, modules)}
            foreign = names - KERNELS_MAY_IMPORT - sys.stdlib_module_names
            assert not foreign, f"{path.relative_to(ROOT)} imports {foreign}"


def test_private_jax_stays_in_target():
    modules = module_files(ROOT)
    for path in modules.values():
        is_private = any(name.startswith("jax._src") for name in imports(path, modules))
        assert not is_private or path == ROOT / "pallas_kernels/target.py", path


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


def test_files_and_folders_stay_small():
    for path in module_files(ROOT).values():
        here = path.relative_to(ROOT)
        num_lines = len(path.read_text().splitlines())
        cap = MAX_LINES[here.parts[0]]
        assert num_lines <= cap, f"{here} has {num_lines} lines, at most {cap}"
        assert len(here.parts) <= 3, f"{here} lies deeper than one folder under its package"


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
