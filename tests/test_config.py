"""The configuration: names and values that others rely on, and one line for each mistake."""
# ruff: noqa: E501 (the table of mistakes has one on each line)

import inspect
import textwrap
from pathlib import Path

import pytest
from pydantic import ValidationError

import megatron_growth
from megatron_growth import GrowthConfig, GrowthPlan, GrowthStorageReader
from megatron_growth.config import (
    BaseConfig,
    DepthConfig,
    GrowthFile,
    NoiseConfig,
    WidthConfig,
    load_config,
)
from megatron_growth.errors import ConfigError
from megatron_growth.mistakes import explain

PINNED = {
    "depth": {
        "method": "interposition",
        "factor": 2,
        "skip_first": 0,
        "skip_last": 0,
        "new_layer_init": "copy",
    },
    "width": {
        "factor": 2,
        "top_k": "scale",
        "order": "interleave",
        "noise": {"experts": 0.01, "router": 0.01},
    },
    "optimizer": "reset",
    "seed": 1234,
}


# -- what others rely on


def test_the_public_names_are_these() -> None:
    assert set(megatron_growth.__all__) >= {"GrowthConfig", "GrowthPlan", "GrowthStorageReader"}
    for name in megatron_growth.__all__:
        assert getattr(megatron_growth, name).__name__ == name


def test_the_reader_takes_a_directory_a_growth_and_a_base_reader() -> None:
    parameters = inspect.signature(GrowthStorageReader).parameters
    assert list(parameters)[:3] == ["checkpoint_dir", "growth", "base"]
    assert parameters["base"].default is None
    assert all(p.default is not inspect.Parameter.empty for p in list(parameters.values())[2:])


def test_a_plan_is_written_and_read_by_these_names() -> None:
    for name in ("to_json", "from_json", "fingerprint", "resolve"):
        assert hasattr(GrowthPlan, name)


def test_the_pinned_configuration_validates_to_itself() -> None:
    config = GrowthConfig.model_validate(PINNED)
    assert config.model_dump(exclude_unset=True) == PINNED
    assert config.depth == DepthConfig(
        method="interposition", factor=2, skip_first=0, skip_last=0, new_layer_init="copy"
    )
    noise = NoiseConfig(experts=0.01, router=0.01)
    assert config.width == WidthConfig(factor=2, top_k="scale", order="interleave", noise=noise)
    assert (config.optimizer, config.seed) == ("reset", 1234)


def test_defaults_are_the_papers_where_it_gives_any() -> None:
    assert GrowthConfig.model_validate({"depth": {}, "width": {}}).model_dump() == {
        "depth": {"method": "interposition", "factor": None, "target_layers": None, "map": None, "skip_first": 0,
                  "skip_last": 0, "new_layer_init": "copy"},
        "width": {"factor": 2, "top_k": "scale", "clones": "active", "order": "auto", "noise": {"experts": 0.01, "router": 0.01}},
        "optimizer": "rescale",
        "seed": 1234,
        "as_is": False,
    }  # fmt: skip


def test_a_configuration_is_a_frozen_value() -> None:
    config = GrowthConfig.model_validate(PINNED)
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 5  # type: ignore[misc]


@pytest.mark.parametrize(
    "model", [GrowthConfig, DepthConfig, WidthConfig, NoiseConfig, BaseConfig, GrowthFile]
)
def test_every_field_says_what_it_means(model) -> None:
    assert model.model_fields
    for name, field in model.model_fields.items():
        assert field.description, name


# -- reading a file


def _write(directory: Path, text: str) -> Path:
    path = directory / "growth.yaml"
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    return path


def test_a_file_is_read(tmp_path: Path) -> None:
    config = load_config(_write(tmp_path, """
        base: {load: checkpoints/moe-17b, iteration: 1000}
        growth:
          depth: {method: stacking, target_layers: 48, skip_first: 2}
          width: {factor: 3, noise: {router: 0}}
          optimizer: copy
          seed: 9
    """))  # fmt: skip
    assert config.base == BaseConfig(load=Path("checkpoints/moe-17b"), iteration=1000)
    assert config.growth.depth == DepthConfig(method="stacking", target_layers=48, skip_first=2)
    assert config.growth.width == WidthConfig(factor=3, noise=NoiseConfig(experts=0.01, router=0.0))
    assert (config.growth.optimizer, config.growth.seed) == ("copy", 9)


def test_the_base_may_be_left_to_the_command_line(tmp_path: Path) -> None:
    assert load_config(_write(tmp_path, "growth: {depth: {}}")).base == BaseConfig(
        load=None, iteration="latest"
    )


def _refusal(path: Path) -> str:
    with pytest.raises(ConfigError) as refusal:
        load_config(path)
    message = str(refusal.value)
    assert "\n" not in message
    assert str(path) in message
    return message.replace(str(path), "FILE")


# the file: how the message begins, and what else it says
MISTAKES = [
    # misspelt keys
    ("groth: {depth: {}}", "FILE: unknown key 'groth'; did you mean 'growth'?", ""),
    ("growth: {dept: {}}", "FILE: unknown key 'growth.dept'; did you mean 'depth'?", ""),
    ("growth: {depth: {facter: 2}}", "FILE: unknown key 'growth.depth.facter'; did you mean 'factor'?", ""),
    ("growth: {depth: {target_layer: 9}}", "FILE: unknown key 'growth.depth.target_layer'; did you mean 'target_layers'?", ""),
    ("growth: {width: {topk: keep}}", "FILE: unknown key 'growth.width.topk'; did you mean 'top_k'?", ""),
    ("growth: {width: {noise: {expert: 0}}}", "FILE: unknown key 'growth.width.noise.expert'; did you mean 'experts'?", ""),
    ("growth: {depth: {}}\nbase: {lode: x}", "FILE: unknown key 'base.lode'; did you mean 'load'?", ""),
    ("growth: {depth: {}, zzz: 1}", "FILE: unknown key 'growth.zzz'; known keys: depth, width, optimizer, seed, as_is", ""),
    # sizes
    ("growth: {depth: {factor: 1}}", "FILE: growth.depth.factor 1: ", "at least 2"),
    ("growth: {depth: {factor: 0}}", "FILE: growth.depth.factor 0: ", "at least 2"),
    ("growth: {width: {factor: 1}}", "FILE: growth.width.factor 1: ", "at least 2"),
    ("growth: {width: {factor: 0}}", "FILE: growth.width.factor 0: ", "at least 2"),
    ("growth: {width: {factor: 1.5}}", "FILE: growth.width.factor 1.5: ", "a whole number"),
    ("growth: {depth: {factor: two}}", "FILE: growth.depth.factor 'two': ", "a whole number"),
    ("growth: {depth: {target_layers: 0}}", "FILE: growth.depth.target_layers 0: ", "at least 1"),
    ("growth: {depth: {skip_first: -1}}", "FILE: growth.depth.skip_first -1: ", "at least 0"),
    ("growth: {depth: {factor: 2, target_layers: 8}}", "FILE: growth.depth: factor (2) and target_layers (8) both set the size; give one", ""),
    ("growth: {depth: {method: map}}", "FILE: growth.depth: method 'map' takes its layers from `map` alone, got no map", ""),
    ("growth: {depth: {method: map, map: [0, 0], factor: 2}}", "FILE: growth.depth: method 'map' takes its layers from `map` alone, got factor", ""),
    ("growth: {depth: {method: map, map: [0, 0], skip_last: 2}}", "FILE: growth.depth: method 'map' takes its layers from `map` alone, got skip_last", ""),
    ("growth: {depth: {map: [0, 0]}}", "FILE: growth.depth: `map` goes with method 'map', not 'interposition'; set method or drop `map`", ""),
    ("growth: {depth: {method: map, map: [0, x]}}", "FILE: growth.depth.map[1] 'x': ", "a whole number"),
    # choices and ranges
    ("growth: {depth: {method: interpose}}", "FILE: growth.depth.method 'interpose': ", "'interposition', 'stacking' or 'map'"),
    ("growth: {width: {order: random}}", "FILE: growth.width.order 'random': ", "'auto', 'interleave' or 'append'"),
    ("growth: {width: {clones: parked}}", "FILE: growth.width: clones 'parked' take no tokens, but top_k 'scale' sends each token to 2 times as many experts; set `top_k: keep` or `clones: active`", ""),
    ("growth: {width: {clones: asleep}}", "FILE: growth.width.clones 'asleep': ", "'active' or 'parked'"),
    ("growth: {depth: {}, optimizer: keep}", "FILE: growth.optimizer 'keep': ", "'rescale', 'copy' or 'reset'"),
    ("growth: {width: {noise: {experts: -0.1}}}", "FILE: growth.width.noise.experts -0.1: ", "at least 0"),
    ("growth: {width: {noise: {router: .inf}}}", "FILE: growth.width.noise.router inf: ", "finite"),
    ("growth: {width: {noise: {router: .nan}}}", "FILE: growth.width.noise.router nan: ", ""),
    ("growth: {depth: {}, seed: -1}", "FILE: growth.seed -1: ", "at least 0"),
    ("growth: {depth: {}, seed: 9223372036854775808}", "FILE: growth.seed 9223372036854775808: ", "below 9223372036854775808"),
    ("growth: {depth: {}}\nbase: {iteration: last}", "FILE: base.iteration 'last': must be a whole number or 'latest' or 'release'; iteration: ", ""),
    ("growth: {depth: {}}\nbase: {iteration: -3}", "FILE: base.iteration -3: ", ""),
    # nothing, or something else
    ("growth: {}", "FILE: growth: neither `depth` nor `width` is given, so nothing would grow; give one of them", ""),
    ("growth: {as_is: true, depth: {}}", "FILE: growth: as_is grows nothing, and depth would; drop one", ""),
    ("growth: {depth: null}", "FILE: growth: neither `depth` nor `width` is given", ""),
    ("base: {load: x}", "FILE: growth is missing; give it (How it is grown)", ""),
    ("growth: {depth: 3}", "FILE: growth.depth 3: must be a section with keys such as method, factor", ""),
    ("growth:", "FILE: growth is empty; give a section with keys such as depth, width", "(How it is grown)"),
    ("growth: {depth: {factor: true}}", "FILE: growth.depth.factor: true is no number; write one", ""),
    ("growth: {depth: {method: map, map: [0, true]}}", "FILE: growth.depth.map: [1] true is no number; write one", ""),
    ("growth: {depth: {factor: 1000000}}", "FILE: growth.depth.factor 1000000: must be at most 1000", ""),
    ("growth: {depth: {}}\nbase: {load: ''}", "FILE: base.load: is an empty text; say something, or leave it out", ""),
    ("growth: {depth: {}}\nbase: {load: 3}", "FILE: base.load 3: must be a path; load: ", ""),
    ("growth: {depth: {}}\ncontinue: {learning_rate: fast}", "FILE: continue.learning_rate 'fast': must be 'keep' or a section with keys such as peak", ""),
    ("growth: {depth: {}}\ncontinue: {learning_rate: {min: 1}}", "FILE: continue.learning_rate.peak is missing; give it (Learning rate after the warm-up)", ""),
    ("growth: {depth: {}}\ncontinue: {data: {offset: -1}}", "FILE: continue.data.offset -1: must be at least 0", ""),
    ("name: a\nmodel: {}", "FILE is an experiment, which `launch` and `plan` take; give the growth.yaml of one", ""),
    ("growth: yes please", "FILE: growth 'yes please': ", ""),
    ("growth: {1: 2}", "configuration 'FILE': growth (line 1) has the key 1, which YAML does not take for text", ""),
    ("", "configuration 'FILE' is empty; it needs a `growth:` section", ""),
    ("- growth", "configuration 'FILE' holds a list where fields are meant; it needs a `growth:` section", ""),
    ("growth: {depth: {}", "configuration 'FILE' is not YAML: ", "line 1"),
    ("growth:\n\tdepth: {}", "configuration 'FILE' is not YAML: ", "line 2"),
    ("growth: {depth: {method: !!python/name:os.system }}", "configuration 'FILE': growth.depth.method (line 1) has the tag !!python/name:os.system; leave it out", ""),
]  # fmt: skip


@pytest.mark.parametrize(("text", "begins", "says"), MISTAKES, ids=[text for text, *_ in MISTAKES])
def test_a_mistake_is_one_line_that_says_where_and_what(
    tmp_path: Path, text: str, begins: str, says: str
) -> None:
    path = tmp_path / "growth.yaml"
    path.write_text(text, encoding="utf-8")
    message = _refusal(path)
    assert message.startswith(begins)
    assert says in message


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    message = _refusal(tmp_path / "nowhere.yaml")
    assert message.startswith("configuration 'FILE' cannot be read: ")
    assert message.endswith("give the path of a YAML file")


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "growth.yaml"
    path.write_bytes(b"\xff\xfe\x80")
    assert _refusal(path).startswith("configuration 'FILE' cannot be read: ")


def test_a_growth_given_in_code_is_explained_the_same_way() -> None:
    content = {"depth": {"faktor": 2}}
    with pytest.raises(ValidationError) as refusal:
        GrowthConfig.model_validate(content)
    said = explain(refusal.value, GrowthConfig, content)
    assert said == "unknown key 'depth.faktor'; did you mean 'factor'?"
