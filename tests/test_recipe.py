"""Recipes: Python, YAML, TOML, one line and plain data say the same; names tell the truth; errors can be read.

One long file: most of it is tables, of presets and of messages.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dlqc.calibration import SAMPLERS, WEIGHTS, Certainty, Clean, ForwardProcess, MaskedSimulation, Rollout, Uniform
from dlqc.contract import Pass
from dlqc.errors import DlqcError, RecipeError
from dlqc.formats.planes import PlanesFormat
from dlqc.manager import PassManager
from dlqc.passes.assign_bits import AssignBits
from dlqc.passes.calibrate import Calibrate
from dlqc.passes.lower import Lower
from dlqc.passes.pack import Pack
from dlqc.passes.quantize_activations import QuantizeActivations
from dlqc.passes.quantize_weights import QuantizeWeights
from dlqc.passes.smooth import Smooth
from dlqc.presets import CODED
from dlqc.recipe import PASSES, PRESETS, ForeignPass, Recipe, as_recipe, from_plain, parse_line, pass_class
from dlqc.rounding.daq import Daq
from dlqc.rounding.gptaq import Gptaq
from dlqc.rounding.gptq import Gptq
from dlqc.rounding.low_rank import LowRank
from dlqc.rounding.rtn import Rtn
from dlqc.rounding.signround import SignRound
from dlqc.schemes import Override

ROOT = Path(__file__).parent.parent

# ---- any pass with any options -------------------------------------------------------------------------------------

TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=12)


#: Options whose text has a grammar of its own.
SPELLED = {"budget": st.sampled_from(["3.2bpw", "4.5GB", "800 MiB"])}


def options_of(hint: Any) -> st.SearchStrategy[Any]:
    """Values of an option, from its annotation alone."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return st.one_of([options_of(a) for a in arguments])
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin is tuple:
        return st.lists(options_of(arguments[0]), max_size=3).map(tuple)
    if dataclasses.is_dataclass(hint):
        return built(hint)
    simple: dict[Any, st.SearchStrategy[Any]] = {
        bool: st.booleans(),
        int: st.integers(-3, 300) | st.sampled_from([2, 3, 4, 8]),
        float: st.floats(allow_nan=False, allow_infinity=False) | st.floats(0, 1),
        str: TEXT,
        type(None): st.none(),
    }
    return simple[hint]


@st.composite
def built(draw: st.DrawFn, cls: type[Any]) -> Any:
    """An instance with some options set; those that its own checks refuse are drawn again."""
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    missing = dataclasses.MISSING
    needed = {f.name for f in dataclasses.fields(cls) if f.default is missing and f.default_factory is missing}
    chosen = draw(st.sets(st.sampled_from(names))) if names else set()

    def some(wanted: set[str]) -> dict[str, Any]:
        spelled = {name for name in wanted if name in SPELLED and hints[name] is str}
        strategies = {n: SPELLED[n] if n in spelled else options_of(hints[n]) for n in sorted(wanted)}
        return {name: draw(strategy) for name, strategy in strategies.items()}

    for _ in range(20):
        try:
            return cls(**some(chosen | needed))
        except DlqcError:
            continue
    return cls(**some(needed))


def passes() -> st.SearchStrategy[tuple[Pass, ...]]:
    one = st.one_of([built(pass_class(name)) for name in PASSES])
    return st.lists(one, min_size=1, max_size=4).map(tuple)


@settings(max_examples=30, deadline=None)
@given(passes(), TEXT)
def test_plain_and_yaml_round_trip(given_passes: tuple[Pass, ...], name: str) -> None:
    recipe = Recipe(name, given_passes)
    assert from_plain(recipe.to_plain()) == recipe
    assert from_plain(json.loads(json.dumps(recipe.to_plain()))) == recipe
    assert from_plain(yaml.safe_load(recipe.to_yaml())) == recipe


@settings(max_examples=30, deadline=None)
@given(passes())
def test_the_line_round_trips(given_passes: tuple[Pass, ...]) -> None:
    assert parse_line(str(Recipe("", given_passes))) == given_passes


@settings(max_examples=25, deadline=None)
@given(passes(), st.from_regex(r"[a-z0-9-]{0,8}", fullmatch=True))
def test_toml_reads_the_same(
    tmp_path_factory: pytest.TempPathFactory, given_passes: tuple[Pass, ...], name: str
) -> None:
    recipe = Recipe(name, given_passes)
    path = tmp_path_factory.mktemp("toml") / "recipe.toml"
    path.write_text(f"name = {toml(name)}\npasses = {toml(recipe.to_plain()['passes'])}\n", encoding="utf-8")
    assert as_recipe(path) == recipe


def toml(value: Any) -> str:
    """A value in TOML, inline."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {toml(v)}" for key, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if value is None:
        return '"none"'
    if isinstance(value, bool | int | float):
        return repr(value).lower()
    return '"' + "".join(c if c.isalnum() and c.isascii() else f"\\U{ord(c):08x}" for c in value) + '"'


def test_the_three_spellings(tmp_path: Path) -> None:
    python = (Calibrate(sequences=64), QuantizeWeights(bits=3, method=Rtn(clip="mse")), Pack(), Lower())
    line = "calibrate(sequences=64), quantize_weights(bits=3, method=rtn(clip='mse')), pack, lower"
    (tmp_path / "r.yaml").write_text(
        "passes:\n- calibrate: {sequences: 64}\n- quantize_weights: {bits: 3, method: {rtn: {clip: mse}}}\n- pack\n- lower:\n"
    )
    (tmp_path / "r.toml").write_text(
        'passes = [{calibrate = {sequences = 64}}, {quantize_weights = {bits = 3, method = {rtn = {clip = "mse"}}}}, '
        '"pack", "lower"]'
    )
    assert str(Recipe("x", python)) == line
    for source in (python, list(python), line, str(tmp_path / "r.yaml"), tmp_path / "r.yaml", tmp_path / "r.toml"):
        assert as_recipe(source) == Recipe("custom", python)
    assert as_recipe(Pack()) == Recipe("pack", (Pack(),))
    assert as_recipe(Recipe("x", python)).name == "x"


def test_a_name_travels(tmp_path: Path) -> None:
    (tmp_path / "r.yml").write_text(as_recipe("w4a16-gptq").to_yaml())
    assert as_recipe(tmp_path / "r.yml") == as_recipe("w4a16-gptq")


def test_yaml_spells_every_option_out() -> None:
    (data,) = Recipe("x", (QuantizeWeights(),)).to_plain()["passes"]
    assert data["quantize_weights"] == {
        "required": True,
        "strict": False,
        "bits": 4,
        "group_size": 128,
        "symmetric": False,
        "method": {"gptq": {f.name: f.default for f in dataclasses.fields(Gptq)}},
        "skip": [],
        "format": None,
        "head": None,
        "sequential": "block",
        "low_rank": None,
        "overrides": [],
    }


# ---- presets -------------------------------------------------------------------------------------------------------


#: Words of names that tests/test_activation_presets.py is about.
ACTIVATIONS = {"static", "static4", "ag128", "asym", "kv4", "qkv4", "qkv8", "p8", "dllmquant"}


@pytest.mark.parametrize(
    "name",
    [
        *sorted(
            name for name in PRESETS.keys() - CODED.keys() if not (set(name.split("-")) & (ACTIVATIONS | {"nested"}))
        ),
        "w3a16-g64-rtn",
        "w4a8-channel-gptq-clean",
        "w8a16-g128-smoothquant",
        "w3a16-channel-sym-rtn",
        "w4a4-quarot-rtn",
        "w4a4-quarot-gptaq",
        "w4a16-awq-e4h8",
        "w4a4-quarot-e8",
        "w8a8-smoothquant-gptq-h8",
        "w4a16-wanda-rtn",
        "w4a4-quarot-autoround",
        "w3a16-awq-lqer",
        "w2a16-autoround-tmas-cgq",
        "w4a8-icqbc",
        "w6a8-g64-sym-mixed-rtn",
        "w2.75a16-mixed-quarot",
        "w2.5a16-mixed-autoround",
    ],
)
def test_a_preset_s_name_tells_the_truth(name: str) -> None:
    recipe = as_recipe(name)
    assert recipe.name == name
    PassManager(recipe.passes).check_order()
    by_name = {p.name: p for p in recipe.passes}
    assert len(by_name) == len(recipe.passes)
    words = name.split("-")
    ends = re.fullmatch(r"(?:e(\d))?(?:h(\d))?", words[-1])
    table, head = ends.groups() if ends else (None, None)
    number, spelled_act = re.fullmatch(r"w(\d|\d\.\d+)a(\d+)", words[0]).groups()  # type: ignore[union-attr]
    mixed, act = "mixed" in words, int(spelled_act)
    bits = None if mixed else int(number)

    weights = by_name["quantize_weights"]
    assert isinstance(weights, QuantizeWeights)
    assert mixed or weights.bits == bits
    assert ("assign_bits" in by_name) == mixed
    if mixed:
        assign = by_name["assign_bits"]
        assert isinstance(assign, AssignBits)
        assert assign.budget == f"{number}bpw"
        options = ("group_size", "symmetric", "method")
        assert [getattr(assign, o) for o in options] == [getattr(weights, o) for o in options]
    groups = {None} if "channel" in words else {int(w[1:]) for w in words if re.fullmatch(r"g\d+", w)}
    assert weights.group_size == (groups.pop() if groups else None if bits == 8 or act < 8 else 128)
    assert weights.symmetric == (bits == 8 or act < 8 or "sym" in words)
    assert weights.skip == ()
    assert weights.sequential == ("layer" if "gptaq" in words else "block")
    learned = "autoround" in words
    over = bool({"quarot", "sparsegpt", "wanda"} & set(words)) and not learned and "rtn" not in words
    by_gptq = bool({"gptq", "gptaq", "lqer"} & set(words)) or over
    kinds = {"gptaq": Gptaq, "autoround": SignRound}
    assert type(weights.method) is next((kinds[w] for w in words if w in kinds), Gptq if by_gptq else Rtn)
    if isinstance(weights.method, SignRound):
        assert weights.method.act_bits == (None if act == 16 else act)
    assert weights.low_rank == (LowRank() if "lqer" in words else None)
    assert ("correct_bias" in by_name) == ("icqbc" in words)

    assert ("quantize_activations" in by_name) == (act != 16)
    if act != 16:
        assert by_name["quantize_activations"] == QuantizeActivations(bits=act, group_size=None, symmetric=True)
    assert ("smooth" in by_name) == bool({"smooth", "smoothquant", "duquant"} & set(words))
    assert ("rotate_hidden" in by_name) == ("quarot" in words)
    for method, step in {"duquant": "duquant", "flatquant": "flatquant", "spinquant": "learn_rotation"}.items():
        assert (step in by_name) == (method in words)
    assert ("awq_scale" in by_name) == ("awq" in words)
    assert ("calibrate" in by_name) == (
        by_gptq
        or mixed
        or learned
        or bool({"smooth", "smoothquant", "duquant", "awq", "spinquant", "flatquant", "icqbc"} & set(words))
        or bool({"llmint8", "sparsegpt", "wanda"} & set(words))
    )
    assert ("split_outliers" in by_name) == ("llmint8" in words)
    assert ("sparsify" in by_name) == bool({"sparsegpt", "wanda"} & set(words))
    assert weights.head == (None if head is None else int(head))
    assert ("quantize_embedding" in by_name) == (table is not None)
    if table is not None:
        order = [p.scope for p in recipe.passes]
        assert by_name["quantize_embedding"].bits == int(table)  # type: ignore[attr-defined]
        assert order.index("block") == [p.name for p in recipe.passes].index("quantize_embedding") + 1
    if "calibrate" in by_name:
        calibrate = by_name["calibrate"]
        assert isinstance(calibrate, Calibrate)
        by_variant = {"clean": Clean, "tmas": Rollout}
        expected = next((by_variant[word] for word in words if word in by_variant), MaskedSimulation)
        assert type(calibrate.sampler) is expected
        assert isinstance(calibrate.weight, Certainty if "cgq" in words else Uniform)
    assert [p.name for p in recipe.passes[-2:]] == ["pack", "lower"]


@pytest.mark.parametrize(("name", "words"), PRESETS.items())
def test_a_preset_s_description_tells_the_truth(name: str, words: str) -> None:
    if words.startswith("as "):
        assert words.split()[1].rstrip(",") in PRESETS
        return
    weights = next(p for p in as_recipe(name).passes if isinstance(p, QuantizeWeights))
    if weights.format is not None:
        assert ("nearest rounding, no calibration" in words) == (weights.method == Rtn())
        assert ("no calibration" in words) == ("on masked states" not in words)
        assert ("on masked states" in words) == (
            as_recipe(name).passes[0] in (Calibrate(), Calibrate(ForwardProcess()))
        )
        assert "nested" in name or name.startswith(f"w{int(weights.target.bits_per_weight(4096, 4096))}a16-")
        assert as_recipe(name).passes[-1].name == ("adapt_precision" if "adaptive" in name else "lower")
        return
    if "mixed" in name:
        assert (
            words
            == "2, 3, 4 and 8-bit weights g128 by GPTQ on masked states, 4 bits per weight on average, all counted"
        )
        assert as_recipe(name).passes[1] == AssignBits("4bpw", (2, 3, 4, 8), 128, method=Gptq())
        return
    group = "per channel" if weights.group_size is None else f"g{weights.group_size}"
    assert words.startswith(f"{weights.bits}-bit weights {group}")
    act = int(re.search(r"a(\d+)-", name).group(1))  # type: ignore[union-attr]
    assert (f"{act}-bit activations per token" in words) == (act != 16)
    for title, method in {"GPTQ": Gptq, "GPTAQ": Gptaq, "(SignRound)": SignRound, "nearest rounding": Rtn}.items():
        assert (title in words) == (type(weights.method) is method)


def test_every_pass_is_named_by_its_file() -> None:
    files = {p.stem for p in (ROOT / "passes").glob("*.py")} - {"__init__"}
    assert files == set(PASSES)
    for name in PASSES:
        assert pass_class(name).name == name
        assert pass_class(name).__module__ == f"dlqc.passes.{name}"


def test_samplers_and_weights_can_be_named() -> None:
    for cls in SAMPLERS:
        assert parse_line(f"calibrate(sampler={cls.name})") == (Calibrate(sampler=cls()),)
    for weight in WEIGHTS:
        assert parse_line(f"calibrate(weight={weight.name})") == (Calibrate(weight=weight()),)


def preset_table() -> str:
    rows = [f"| `{name}` | {words} | `{as_recipe(name)}` |" for name, words in PRESETS.items()]
    return "\n".join(["| name | what it makes | passes |", "|---|---|---|", *rows])


def test_the_table_of_the_documentation() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    found = page.split("<!-- presets -->\n")[1].strip()
    assert found == preset_table(), f"put this into docs/recipes.md:\n{preset_table()}"


def test_the_examples_of_the_documentation(tmp_path: Path) -> None:
    """The page shows one recipe in four spellings."""
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    block = dict(re.findall(r"```(\w+)\n(.*?)```", page, flags=re.DOTALL))
    scope: dict[str, Any] = {}
    exec(block["python"], scope)
    expected = as_recipe(scope["passes"]).passes
    for suffix in ("yaml", "toml"):
        (tmp_path / f"r.{suffix}").write_text(block[suffix])
        assert as_recipe(tmp_path / f"r.{suffix}").passes == expected
    assert parse_line(block["text"].strip()) == expected
    assert str(Recipe("", expected)) == block["text"].strip()


def test_overrides_in_the_documentation() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    block = re.search(r"```\n(- quantize_weights:\n.*?)```", page, flags=re.DOTALL)
    assert block is not None
    (found,) = from_plain({"passes": yaml.safe_load(block[1])}).passes
    assert found == QuantizeWeights(
        bits=3,
        overrides=(
            Override(bits=4, group_size=64, sites=("*.ff_out",)),
            Override(format=PlanesFormat(), method=Daq(), sites=("*.0.*",)),
        ),
    )


# ---- passes of the user's own --------------------------------------------------------------------------------------


SOURCE = """
from __future__ import annotations
from dataclasses import dataclass, field
from typing import ClassVar, Optional
from dlqc.contract import Pass
from dlqc.rounding.gptq import Gptq
from dlqc.rounding.rtn import Rtn

@dataclass(frozen=True)
class Mine(Pass):
    name: ClassVar[str] = "mine"
    depth: int
    ratio: Optional[float] = None
    method: Rtn | Gptq | None = None
    names: tuple[str, ...] = ("a",)
    free: dict[str, int] = field(default_factory=dict)

@dataclass(frozen=True)
class Nameless(Pass):
    name: ClassVar[str] = "nameless"
    option: Forgotten = None
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The import path of a pass as a user writes one."""
    (tmp_path / "their_package").mkdir()
    (tmp_path / "their_package" / "passes.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    yield "their_package.passes.Mine"
    for name in ("their_package", "their_package.passes"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    "options",
    [
        {"depth": 3},
        {"depth": 3, "ratio": 0.5, "method": Rtn(clip="mse"), "names": ("x", "y"), "required": False},
        {"depth": -1, "method": Gptq(damp=0.1), "free": {"a": 1}},
    ],
)
def test_a_user_s_pass(mine: str, options: dict[str, Any], tmp_path: Path) -> None:
    recipe = Recipe("mine", (pass_class(mine)(**options), Pack()))
    assert list(recipe.to_plain()["passes"][0]) == [mine]
    (tmp_path / "r.yaml").write_text(recipe.to_yaml())
    assert as_recipe(tmp_path / "r.yaml") == recipe
    assert as_recipe(str(recipe)).passes == recipe.passes


def test_a_user_s_pass_is_not_imported_where_that_is_asked(mine: str) -> None:
    recipe = Recipe("mine", (pass_class(mine)(depth=3, method=Rtn()), Pack()))
    sys.modules.pop("their_package.passes")
    kept = from_plain(recipe.to_plain(), imports=False)
    assert "their_package.passes" not in sys.modules
    assert kept.passes[1] == Pack()
    assert isinstance(kept.passes[0], ForeignPass)
    assert kept.to_plain() == recipe.to_plain()
    assert from_plain(kept.to_plain(), imports=False) == kept


# ---- errors --------------------------------------------------------------------------------------------------------


def message(call: Callable[[], object]) -> str:
    with pytest.raises(RecipeError) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("w4a16-gtpq", "passes: unknown recipe 'w4a16-gtpq'. Did you mean 'w4a16-gptq'?"),
        ("w5a16-rtn", "passes: unknown recipe 'w5a16-rtn'. Did you mean 'w8a16-rtn'?"),
        ("quantise_weights", "passes: unknown recipe 'quantise_weights'. Did you mean 'quantize_weights'?"),
        ("quantise_weights(bits=3)", "passes: unknown pass 'quantise_weights'. Did you mean 'quantize_weights'?"),
        ("quantize_weights(bit=3)", "quantize_weights: unknown option 'bit'. Did you mean 'bits'?"),
        ("quantize_weights(3)", "passes: options need names in 'quantize_weights(3)'. Write option=value"),
        ("quantize_weights(**{})", "passes: options need names in 'quantize_weights(**{})'. Write option=value"),
        (
            "quantize_weights(bits=four)",
            "quantize_weights.bits: 'four' does not fit (Input should be a valid integer, unable to parse string as an "
            "integer). Expected int",
        ),
        (
            "quantize_weights(bits=True)",
            "quantize_weights.bits: True does not fit (True is no number or text). Expected int",
        ),
        ("quantize_weights(bits=5)", "bits: 5 is not a width of an integer weight. Use 2, 3, 4 or 8"),
        (
            "quantize_weights(group_size=1.5)",
            "quantize_weights.group_size: 1.5 does not fit (Input should be a valid integer, got a number with a "
            "fractional part). Expected int | None",
        ),
        (
            "quantize_weights(method=gpqt)",
            "quantize_weights.method: unknown choice 'gpqt'. Did you mean 'gptq'?",
        ),
        (
            "quantize_weights(method=rtn(speed=1))",
            "quantize_weights.method: unknown option 'speed'. Known: clip",
        ),
        ("quantize_weights(method=3)", "quantize_weights.method: 3 is neither a name nor {name: options}. See docs/"),
        (
            "smooth(sites=edge)",
            "smooth.sites: 'edge' does not fit (Input should be 'norm', 'product', 'value' or 'all'). Expected Literal",
        ),
        ("smooth(alpha=2)", "smooth.alpha: 2.0 is outside [0, 1]. 0.5 is the usual value"),
        ("calibrate(sequences=open('x'))", "passes: options need names in"),
        ("calibrate(sequences=1+1)", "passes: '1 + 1' is no plain value. Use numbers and names"),
        ("calibrate(sequences={[]: 1})", "passes: '{[]: 1}' is no plain value. Use numbers and names"),
        ("calibrate(sequences=(lambda: 3)())", "passes: 'lambda: 3' is no plain value"),
        (
            "calibrate(, pack",
            "passes: cannot read 'calibrate(, pack'. Write it like: calibrate(sequences=64), pack, lower",
        ),
        ("pack) or (lower", "passes: cannot read 'pack) or (lower'. Write it like"),
        ("pack, \0", "passes: cannot read"),
        ("pack," + "-" * 100_000 + "1", "passes: cannot read"),
        ("3, 4", "passes: 3 is neither a name nor {name: options}. See docs/recipes.md"),
        ("pack[0],", "passes: "),
        (
            "no_such_module.Pass",
            "no_such_module.Pass: cannot import the pass (No module named 'no_such_module'). Check",
        ),
        ("dlqc.contract.Past", "dlqc.contract.Past: cannot import the pass (module 'dlqc.contract' has no attribute"),
        ("json.loads", "json.loads: not a subclass of dlqc.Pass. Derive it from dlqc.Pass"),
        ("w3.2a16-gptq", "w3.2a16-gptq: no code has 3.2 bits. For an average use 'w3.2a16-mixed-gptq'"),
        ("w3a16-mixed-awq", "w3a16-mixed-awq: -mixed does not go with awq, which has to know the width of each weight"),
        ("w3a16-mixed-lqer", "w3a16-mixed-lqer: -mixed does not go with lqer, whose corrections no budget counts. Use"),
        (
            "w3a16-mixed-icqbc",
            "w3a16-mixed-icqbc: -mixed does not go with icqbc, whose corrections no budget counts. Use",
        ),
        ("w0a16-mixed-gptq", "budget: '0bpw' leaves nothing. Write '3.2bpw' or '4.5GB'"),
        (
            "quantize_weights(overrides=override(bits=3))",
            "quantize_weights.overrides: {'override': {'bits': 3}} is no list. Write a list, in brackets",
        ),
        (
            "quantize_weights(overrides=(override(bits=3), pack))",
            "quantize_weights.overrides[1]: unknown choice 'pack'. Known: override",
        ),
        (
            "w4a16-rtn-clean",
            "w4a16-rtn-clean: -clean goes with gptq, gptaq, autoround, lqer and fixed ranges only. Use 'w4a16-rtn'",
        ),
        ("w4a16-g0-rtn", "group_size: a group of 0 input features is impossible"),
        ("", "passes: unknown recipe ''. Known: adapt_precision"),
    ],
)
def test_a_text_that_is_no_recipe(text: str, expected: str) -> None:
    assert message(lambda: as_recipe(text)).startswith(expected)


def test_code_in_a_line_is_not_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for line in (
        "__import__('os').system('touch pwned'), pack",
        "calibrate(sequences=__import__('os').system('touch pwned'))",
        "calibrate(sequences=[open(p, 'w') for p in ['pwned']])",
        "pack) or open('pwned', 'w') or (pack",
    ):
        message(lambda line=line: as_recipe(line))  # type: ignore[misc]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ([], "recipe: a recipe is a mapping with a list 'passes'. See docs/recipes.md for the shape"),
        ({}, "recipe: a recipe is a mapping with a list 'passes'"),
        ({"passes": "pack"}, "recipe: a recipe is a mapping with a list 'passes'"),
        ({"passes": [], "nam": "x"}, "recipe: unknown key 'nam'. Did you mean 'name'?"),
        ({"passes": [3]}, "recipe: 3 is neither a name nor {name: options}"),
        ({"passes": [{"pack": {}, "lower": {}}]}, "recipe: {'pack': {}, 'lower': {}} is neither a name nor"),
        ({"passes": [{"pack": [1]}]}, "recipe: {'pack': [1]} is neither a name nor"),
        ({"passes": [{"pack": {1: 2}}]}, "pack: unknown option 1. Known: required"),
        ({"passes": ["..x"]}, "passes: unknown pass '..x'. Known: adapt_precision"),
        ({"passes": [""]}, "passes: unknown pass ''. Known: adapt_precision"),
    ],
)
def test_data_that_is_no_recipe(data: Any, expected: str) -> None:
    assert message(lambda: from_plain(data)).startswith(expected)


def test_an_option_that_is_missing(mine: str) -> None:
    assert message(lambda: as_recipe(mine)) == f"{mine}: option 'depth' is missing. Write depth=…"


def test_an_option_whose_type_is_unknown(mine: str) -> None:
    nameless = mine.replace("Mine", "Nameless")
    assert message(lambda: as_recipe(nameless)) == (
        f"{nameless}: the type of an option is unknown (name 'Forgotten' is not defined). Import it in the pass's module"
    )


def test_a_module_that_fails_on_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_pass.py").write_text("1/0")
    monkeypatch.syspath_prepend(tmp_path)
    assert message(lambda: as_recipe("broken_pass.Pass")).startswith(
        "broken_pass.Pass: cannot import the pass (division by zero). Check the import path"
    )


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (5, "passes: 5 is no recipe. Give Pass objects, a preset name, a file, or one line of text"),
        (None, "passes: None is no recipe. Give"),
        ([Pack(), "lower"], "passes: 'lower' is no pass. Give Pass objects"),
        ([Pack], "passes: <class 'dlqc.passes.pack.Pack'> is no pass. Give Pass objects"),
    ],
)
def test_an_object_that_is_no_recipe(source: Any, expected: str) -> None:
    assert message(lambda: as_recipe(source)).startswith(expected)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("r.yaml", None, "r.yaml: the recipe cannot be read. Check the path"),
        ("r.yaml", "passes: [", "r.yaml: not valid: while parsing"),
        ("r.yaml", "!!python/object/apply:os.system ['true']", "r.yaml: not valid: could not determine a constructor"),
        ("r.toml", "passes = [", "r.toml: not valid: "),
        ("r.toml", "passes = 3", "r.toml: a recipe is a mapping with a list 'passes'"),
        ("r.json", "{}", "r.json: is no recipe file. Recipe files end in .yaml, .yml or .toml"),
    ],
)
def test_a_file_that_is_no_recipe(name: str, text: str | None, expected: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    assert message(lambda: as_recipe(tmp_path / name)).startswith(f"{tmp_path}/{expected}")


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe\xff")
    assert "r.yaml: the recipe cannot be read" in message(lambda: as_recipe(tmp_path / "r.yaml"))


def test_recipes_may_be_compared_and_are_frozen() -> None:
    assert as_recipe("w4a16-gptq") != as_recipe("w4a16-gptq-clean")
    with pytest.raises(dataclasses.FrozenInstanceError):
        as_recipe("w4a16-gptq").name = "x"  # type: ignore[misc]
    assert Smooth(alpha=0.5) == Smooth()
