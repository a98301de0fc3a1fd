"""Every YAML under conf/ composes into the types of fusion/config/, and what is out of range is named."""

from __future__ import annotations

import dataclasses
import inspect
import operator
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast, get_args, get_type_hints

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from fusion.cli.config_sources import TABLES, conf_folder, keys_of
from fusion.cli.messages import explain
from fusion.config.commands import EvaluateConfig, InspectConfig, PredictConfig, RankConfig, ReportConfig
from fusion.config.compositions import COMPOSITIONS
from fusion.config.methods import METHODS
from fusion.config.stages import SelectConfig, Stage1Config, Stage2Config
from fusion.config.task import TaskConfig
from fusion.config.training import RATES, TrainerConfig
from fusion.errors import UserError
from pipelines.benchmark.config import BenchmarkConfig

SCHEMAS = {
    "stage1": Stage1Config,
    "stage2": Stage2Config,
    "select": SelectConfig,
    "rank": RankConfig,
    "evaluate": EvaluateConfig,
    "predict": PredictConfig,
    "inspect": InspectConfig,
    "report": ReportConfig,
    "benchmark": BenchmarkConfig,
}
NEEDED = {
    "stage1": ["+task=rte"],
    "stage2": ["+task=rte", "sources=[a,b]"],
    "select": ["+task=rte", "sources=[a,b]"],
    "rank": ["+task=rte"],
    "evaluate": ["artifact=rte"],
    "predict": ["artifact=rte", "input=rows.jsonl", "output=out.jsonl"],
    "inspect": ["artifact=rte-adapterfusion"],
    "report": [],
    "benchmark": ["suite=train"],
}
GROUPS = {
    "stage1": ("backbone", "adapter", "method", "logger", "experiment", "debug"),
    "stage2": ("backbone", "composition", "logger", "experiment", "debug"),
}
STAGE1_EXPERIMENTS = {"shallow", "deep", "bottleneck_16", "bottleneck_64", "bottleneck_256"} | {
    *("decoder_deep", "t5_both")
}
# What the code gives to Lightning's Trainer itself.
OWNED_BY_CODE = {"self", "logger", "callbacks", "plugins", "use_distributed_sampler"}


@pytest.fixture(scope="module", autouse=True)
def hydra() -> Iterator[None]:
    for name, schema in SCHEMAS.items():
        ConfigStore.instance().store(name=f"{name}_schema", node=schema)
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        yield


# As they are where `app.prepare` has made task files of their names.
TWO_TASKS = f"tasks=[{','.join(f'{{name:{n},text:text,labels:[x,y],metrics:[accuracy]}}' for n in 'ab')}]"


def typed(command: str, *overrides: str) -> Any:
    return OmegaConf.to_object(compose(command, [*NEEDED[command], *overrides]))


def group_files() -> list[tuple[str, str]]:
    return sorted((file.parent.name, file.stem) for file in conf_folder().glob("*/*.yaml"))


def choices() -> list[tuple[str, str]]:
    """Every GROUP=NAME, of files and of tables."""
    return sorted([*group_files(), *((group, name) for group, names in TABLES.items() for name in names)])


def test_all_files_are_found() -> None:
    found: dict[str, set[str]] = {}
    for group, name in group_files():
        found.setdefault(group, set()).add(name)
    tasks = found.pop("task")
    assert len(tasks) >= 34
    assert found == {
        "backbone": {
            *("minilm", "bert_base", "bert_large", "roberta_base", "xlmr_base", "electra_base", "distilbert_base"),
            *("albert_base", "mpnet_base", "deberta_v3_base", "modernbert_base"),
            *("gpt2", "gemma3_270m", "qwen3_0_6b", "llama3_2_1b", "mistral_7b"),
            *("t5_base", "flan_t5_base", "bart_base"),
        },
        "adapter": {"pfeiffer", "houlsby", "houlsby_ffn_only", "parallel", "before_attention"},
        "logger": {"wandb", "csv", "none"},
        "experiment": {"quick", "equal_budget", "t5_encoder_only", *STAGE1_EXPERIMENTS},
        "debug": {"one_batch", "limit", "overfit", "anomaly", "profile"},
    }
    assert {file.stem for file in conf_folder().glob("*.yaml")} == {*SCHEMAS, "launch", "training", "artifact"}
    assert not list(conf_folder().glob("*/*/*.yaml"))


def test_the_tables_have_every_name_of_version_0_1() -> None:
    assert {
        *("adapterfusion", "sequence", "static", "mean", "average", "pruned", "continued"),
        *("scalearn", "scalearn_uniform", "scalearn_pp", "scalearn_uniform_pp"),
    } <= set(TABLES["composition"])
    methods = {"adapter", "head", "lora", "bitfit", "full", "multitask_adapter", "multitask_full"}
    assert methods <= set(TABLES["method"])
    assert not {*TABLES} & {group for group, _ in group_files()}


@pytest.mark.parametrize(("group", "name"), choices())
def test_every_choice_composes(group: str, name: str) -> None:
    if group == "task":
        OmegaConf.to_object(compose("stage1", [f"+task={name}"]))
        return
    commands = [command for command, groups in GROUPS.items() if group in groups]
    if group == "experiment" and name in STAGE1_EXPERIMENTS:
        commands = ["stage1"]
    assert commands
    for command in commands:
        needed = ["composition.fusion=x", "composition.keep=1"] if name == "pruned" else []
        needed += [TWO_TASKS] if name.startswith("multitask_") else []
        config = typed(command, f"{group}={name}", *needed)
        if group in ("adapter", "composition", "method"):
            assert getattr(config, group).name == name


@pytest.mark.parametrize("command", SCHEMAS)
def test_defaults_are_typed(command: str) -> None:
    assert isinstance(typed(command), SCHEMAS[command])


@pytest.mark.parametrize(
    ("command", "overrides", "rate"),
    [
        ("stage1", ["method=lora", "backbone.rates={lora:0.25,adapter:0.5}"], 0.25),
        ("stage1", ["method=head", "backbone.rates={lora:0.25,adapter:0.5}"], RATES["head"]),
        ("stage1", ["method=full"], RATES["full"]),
        ("stage1", ["backbone.rates={adapter:0.5}", "optim.lr=3e-3"], 3e-3),
        ("stage2", ["backbone.rates={fusion:0.125}"], 0.125),
        ("stage2", ["composition=scalearn", "backbone.rates={fusion:0.125}"], RATES["scales"]),
        ("stage2", ["composition=mean"], RATES["head"]),
        ("stage2", ["composition=average", "composition.train=true"], RATES["adapter"]),
    ],
)
def test_the_default_learning_rate_depends_on_backbone_and_method(
    command: str, overrides: list[str], rate: float
) -> None:
    assert typed(command, *overrides).optim.lr == rate


def test_every_method_and_composition_has_a_default_learning_rate() -> None:
    used = {one.rate for one in METHODS.values()} | {one.rate for one in COMPOSITIONS.values()}
    assert used == RATES.keys()


def test_default_values() -> None:
    one, two = typed("stage1"), typed("stage2")
    assert (one.optim.lr, one.optim.epochs, one.trainer.max_epochs) == (5e-4, 30, None)
    assert (two.optim.lr, two.optim.epochs, two.trainer.max_epochs) == (2e-4, 10, None)
    for config in (one, two):
        assert config.backbone.name_or_path == "google-bert/bert-base-uncased"
        assert config.logger.wandb is not None and config.logger.csv is None
        assert (config.store, config.seed, config.overwrite, config.resume) == ("outputs/store", 42, False, True)
        assert (config.data.max_length, config.data.batch_size) == (128, 32)
    assert (one.adapter.sites, one.adapter.reads, one.adapter.nonlinearity) == (["feedforward"], "normed", "relu")
    assert one.adapter.size_for(384) == 24
    assert two.composition.name == "adapterfusion"


def test_placements_and_backbones() -> None:
    houlsby = typed("stage1", "adapter=houlsby").adapter
    assert (houlsby.sites, houlsby.reads, houlsby.nonlinearity) == (["attention", "feedforward"], "output", "silu")
    minilm = typed("stage1", "backbone=minilm").backbone
    assert minilm.pooling == "mean"
    # a backbone that replaces another keeps no settings of it


def test_loggers_combine() -> None:
    assert dataclasses.asdict(typed("stage1", "logger=none").logger) == {"wandb": None, "csv": None}
    both = typed("stage1", "logger=[wandb,csv]").logger
    assert both.wandb is not None and both.csv is not None
    only = typed("stage1", "logger=csv").logger
    assert only.wandb is None and only.csv is not None


def test_data_dir_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FUSION_DATA_DIR", raising=False)
    assert typed("stage1").data.dir is None
    monkeypatch.setenv("FUSION_DATA_DIR", "/some where")
    assert typed("benchmark").data_dir == "/some where"
    for command in {*SCHEMAS} - {"benchmark"}:
        assert typed(command).data.dir == "/some where"
    assert typed("stage1", "data.dir=here").data.dir == "here"


def test_the_trainer_schema_has_every_argument_that_yaml_can_express() -> None:
    import pytorch_lightning

    arguments = set(inspect.signature(pytorch_lightning.Trainer.__init__).parameters)
    ours = {field.name for field in dataclasses.fields(TrainerConfig)}
    assert arguments - OWNED_BY_CODE == ours
    assert arguments >= OWNED_BY_CODE


def test_every_trainer_key_is_an_override_without_plus() -> None:
    values = {"bool": "true", "int": "3", "float": "0.5"}
    own = {"precision": "bf16-mixed", "deterministic": "warn"}
    overrides = [
        f"trainer.{field.name}={own.get(field.name) or values.get(type(field.default).__name__, '3')}"
        for field in dataclasses.fields(TrainerConfig)
        if field.name != "model_registry"
    ]
    compose("stage1", [*NEEDED["stage1"], *overrides, "trainer.model_registry=none"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("adapter.bottleneck_size=0", "a whole number >= 1"),
        ("adapter.reduction_factor=0", "a finite number > 0, or null for adapter.bottleneck_size"),
        ("adapter.reduction_factor=null", "adapter.bottleneck_size=N"),
        ("adapter.nonlinearity=sine", "one of relu, gelu, silu, tanh"),
        ("adapter.init=zero", "one of bert, houlsby, zero_up"),
        ("adapter.dropout=1", "a finite number >= 0 and < 1"),
        ("adapter.layers=last:0", "null (all layers), last:N"),
        ("adapter.layers=[1,1]", "a list of different layers"),
        ("adapter.sites=[middle]", "some of before_attention, attention, cross_attention, feedforward, each once"),
        ("adapter.sites=[before_attention]", "expected adapter.reads=input"),
        ("adapter.scaling=nan", "a finite number, or learned"),
        ("adapter.bottleneck_size=99999999999999999999", "a whole number >= 1"),
        (f"adapter.scaling=1{309 * '0'}", "a finite number, or learned"),
        ("adapter.scaling=learnt", "a finite number, or learned"),
        ("adapter.scaling=true", "a finite number, or learned"),
        ("adapter.drop=specialized:0", "null, specialized:N"),
        ("adapter.drop=5", "null, specialized:N"),
        ("adapter.drop=robust method=head", "method=head has no adapters to drop"),
        ("backbone.name_or_path=''", "a Hub id or a folder"),
        ("head.layers=3", "a whole number >= 1 and <= 2"),
        ("head.pooling=max", "one of cls, last, mean, or null for backbone.pooling"),
        ("optim.lr=0", "a finite number > 0 and < 1000, such as 1e-4"),
        ("optim.lr=1e6", "a finite number > 0 and < 1000, such as 1e-4"),
        ("optim.weight_decay=inf", "a finite number >= 0"),
        ("optim.warmup=1.5", "a finite number >= 0 and <= 1"),
        ("trainer.max_epochs=0", "a whole number >= 1"),
        ("backbone.rates={adapter:0}", "numbers > 0 by what is trained (head, adapter, lora"),
        ("backbone.rates={adaptor:1}", "numbers > 0 by what is trained (head, adapter, lora"),
        ("trainer.max_steps=0", "a whole number >= 1, or -1"),
        ("trainer.max_time=90", "DAYS:HOURS:MINUTES:SECONDS"),
        ("trainer.precision=bf16-true", "one of 32-true, bf16-mixed"),
        ("trainer.precision=64", "one of 32-true"),
        ("trainer.precision=half-way", "frozen weights stay float32"),
        ("trainer.deterministic=wran", "true, false or warn"),
        ("trainer.fast_dev_run=-1", "true, false, or a number of batches >= 0"),
        ("trainer.val_check_interval=1.5", "a fraction from 0.0 to 1.0, or a whole number of batches >= 0"),
        ("trainer.limit_train_batches=0", "at least 1 batch"),
        ("trainer.limit_val_batches=0", "data.limit.validation=N"),
        ("trainer.overfit_batches=1", "data.limit.train=N"),
        ("data.batch_size=0", "a whole number >= 1 example"),
        ("data.tokens_per_batch=100", "expected >= 128"),
        ("data.quoting=tsv", "one of csv, none, or null"),
        ("data.max_length=null", "a number of tokens >= 4"),
        ("data.limit.train=0", "a whole number >= 1, or null for all examples"),
        ("seed=-1", "a whole number >= 0 and <= 4294967295"),
        ("logger.wandb.project=a/b", "a name of 1 to 128 characters"),
        ("logger.wandb.mode=on", "one of online, offline, disabled"),
        ("loss.class_weights=[0]", "balanced, or a list"),
        ("method=full backbone.cache=float32", "expected backbone.cache=off"),
        ("method.name=none_such", "method=none_such: expected one of adapter, head"),
        ("method.rank=0", "a whole number >= 1"),
        ("method.alpha=0", "a whole number >= 1"),
        ("method.dropout=1", "a finite number >= 0 and < 1"),
        ("method.targets=[]", "names of linear layers"),
        ("method.temperature=0", "a finite number > 0"),
        ("method.temperature=inf", "a finite number > 0"),
        (TWO_TASKS, "method=adapter: multiple tasks need method=multitask_adapter"),
        ("method=multitask_full", "method=multitask_full trains multiple tasks jointly: expected 'tasks=["),
    ],
)
def test_a_value_out_of_range_is_refused(override: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        typed("stage1", *override.split(" "))
    assert message in str(error.value)
    keys = [word.split("=")[0].removesuffix(".name") for word in override.split(" ")]
    assert any(key in str(error.value) for key in keys)


# What has to be set for a setting to be allowed at all.
TOGETHER: dict[str, dict[str, Any]] = {
    "data.split.seed": {"validation": 0.1},
    "method.rank": {"name": "lora"},
    "method.alpha": {"name": "lora"},
    "method.dropout": {"name": "lora"},
    "method.temperature": {"name": "multitask_adapter"},
    "composition.keep": {"name": "pruned"},
    "composition.prior_own": {"prior": "own"},
    "composition.prior_penalty": {"prior": "uniform"},
    "composition.density": {"name": "average", "merge": "ties"},
    "composition.top_k": {"name": "arrow"},
    "data.limit.train_seed": {"train": 100},
    "search_seeds": {"search": True},
}
BOUNDS = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt}


def numbers_of(schema: type, prefix: str = "") -> Iterator[tuple[str, type, dataclasses.Field[Any], type]]:
    """Each setting that is a number: its key, its class, its field and its type."""
    hints = get_type_hints(schema)
    for f in dataclasses.fields(schema):
        kinds = [hints[f.name], *get_args(hints[f.name])]
        for one in kinds:
            if dataclasses.is_dataclass(one):
                yield from numbers_of(cast(type, one), f"{prefix}{f.name}.")
        if float in kinds or int in kinds:
            yield prefix + f.name, schema, f, float if float in kinds else int


ALL_NUMBERS = {
    found[0]: found for schema in SCHEMAS.values() if schema is not BenchmarkConfig for found in numbers_of(schema)
}


@pytest.mark.parametrize("key", sorted(ALL_NUMBERS))
def test_every_number_has_an_enforced_and_documented_range(key: str) -> None:
    """Every value that is refused is outside the bounds of its message, every other one inside."""
    _, schema, field, kind = ALL_NUMBERS[key]
    base: dict[str, Any] = {"sources": ["a"]} if issubclass(schema, Stage2Config) else {}
    base |= TOGETHER.get(key, {})

    def refusal(value: Any) -> str | None:
        try:
            schema(**base | {field.name: value})
        except UserError as error:
            return str(error)
        return None

    probes = [*(sign * 10.0**n for n in range(-12, 12) for sign in (1, -1)), 0.0, -2, 2, 3, 4, 5, 127, 128, 999, 1001]
    probes += [2**32 - 1, 2**32, 0.5, 0.999, 1.001]
    values = sorted({kind(value) for value in probes if value == kind(value)})
    refused = {value: message for value in values if (message := refusal(value)) is not None}
    assert refused, f"{key}: no number is refused"
    for message in refused.values():
        assert message.startswith((f"{key}=", f"{field.name}=")), message
        expected = message.partition(": expected ")[2].partition(", or ")[0]
        bounds = re.findall(r"(>=|<=|>|<) (-?[\d.e+]+)", expected)
        assert bounds, message
        for value in values:
            inside = all(BOUNDS[sign](value, float(bound)) for sign, bound in bounds)
            inside |= value == -1 and ", or -1 for" in message
            if key != "data.tokens_per_batch":  # its bound is explicit or data.max_length
                assert (value not in refused) == inside, f"{key}={value}: {message}"
    allows_infinity = key in ("backbone.cache_gb", "checkpoint_minutes")
    for value in (float("inf"), float("nan")) if kind is float else ():
        assert (refusal(value) is None) == (allows_infinity and value > 0)
    if (message := refusal(None)) is None:
        assert all(", or null for " in told for told in refused.values())
    else:
        assert f"{field.name}=null" in message


@pytest.mark.parametrize("drop", ["half", "specialized", "specialized:0"])
def test_a_fusion_is_dropped_like_an_adapter(drop: str) -> None:
    with pytest.raises(UserError, match=r"composition\.drop=.*specialized:N"):
        typed("stage2", f"composition.drop={drop}")


def test_multiple_tasks_are_typed_and_name_the_run() -> None:
    config = typed("stage1", TWO_TASKS, "method=multitask_adapter")
    assert [(type(task), task.name, task.labels) for task in config.task_list] == [
        (TaskConfig, "a", ["x", "y"]),
        (TaskConfig, "b", ["x", "y"]),
    ]
    assert config.method.temperature == 2.0
    assert config.default_name() == "a-b-multitask_adapter"
    many = [dataclasses.replace(config.tasks[0], name=f"task_number_{n}") for n in range(16)]
    names = {dataclasses.replace(config, tasks=tasks).default_name() for tasks in (many, many[:-1], many[::-1])}
    assert len(names) == 3 and all(len(name) < 70 for name in names)
    assert any(name.startswith("task_number_0-and-15-more-") for name in names)


def test_compiling_and_checkpointing_are_incompatible() -> None:
    for command in ("stage1", "stage2"):
        with pytest.raises(UserError, match="are incompatible"):
            typed(command, "compile=true", "backbone.gradient_checkpointing=true")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lrr=1", "unknown key optim.lrr: did you mean optim.lr"),
        ("batch_size=1", "unknown key batch_size: did you mean data.batch_size?"),
        ("learning_rate=1", "unknown key learning_rate"),
        ("backbne=minilm", "unknown key backbne: did you mean backbone?"),
        ("backbone=minilmm", "unknown backbone 'minilmm': did you mean minilm?"),
        ("backbone=/my/model", "a Hub id or a folder with backbone.name_or_path=ID_OR_FOLDER"),
        ("trainer.max_epochs=many", "trainer.max_epochs=many: expected a whole number"),
        ("optim.lr=fast", "optim.lr=fast: expected a number"),
        ("compile=often", "compile=often: expected true or false"),
        ("data.limit.train=few", "data.limit.train=few: expected a whole number, or null"),
        ("adapter.sites=ffn,attention", "which needs -m; a list is written 'adapter.sites=[ffn,attention]'"),
        ("a b", "cannot parse the override 'a b': expected KEY=VALUE"),
        ("store=/tmp/日 &", "needs quotes, such as 'store=\"/tmp/日 &\"'"),
        ("größe=1", "special characters"),
        ("sources=[ü]", "a value with special characters needs quotes"),
        ("store=a(b", "needs quotes"),
    ],
)
def test_a_wrong_override_is_explained(override: str, message: str) -> None:
    with pytest.raises(Exception) as error:
        typed("stage1", override)
    explanation = explain(error.value, Stage1Config)
    assert message in explanation
    assert len(explanation.splitlines()) <= 2


@pytest.mark.parametrize("override", ["seed=1,2", "init_from=a,b", "task.name=a,b"])
def test_multiple_values_are_refused_where_one_is_expected(override: str) -> None:
    with pytest.raises(Exception) as error:
        typed("stage1", override)
    assert explain(error.value, Stage1Config) == f"{override}: multiple values are a sweep, which needs -m"


def test_a_value_split_by_the_shell() -> None:
    with pytest.raises(Exception) as error:
        typed("stage1", "data")
    message = explain(error.value, Stage1Config, ["+task=cb", "data.dir=/my", "data"])
    assert message.endswith("a value with a space needs quotes: 'data.dir=/my data'")


@pytest.mark.parametrize("override", ["adapter=houlsby", "adapter.layers=last:3", "experiment=shallow"])
def test_a_key_of_the_other_stage_is_explained(override: str) -> None:
    with pytest.raises(Exception) as error:
        typed("stage2", override)
    assert "it is a setting of stage1, not of this command" in explain(error.value, Stage2Config)


def test_presets_set_what_their_names_state() -> None:
    assert typed("stage1", "experiment=shallow").adapter.layers == "last:3"
    deep = typed("stage1", "experiment=deep").adapter
    assert (deep.name, deep.sites, deep.layers) == ("houlsby", ["attention", "feedforward"], None)
    decoder = typed("stage1", "experiment=decoder_deep", "backbone=gpt2").adapter
    assert (decoder.sites, decoder.reads, decoder.init) == (["attention", "feedforward"], "normed", "zero_up")
    both = typed("stage1", "experiment=t5_both", "backbone=flan_t5_base")
    assert both.adapter.sites == ["attention", "cross_attention", "feedforward"] and not both.backbone.encoder_only
    assert both.backbone.name_or_path == "google/flan-t5-base" and both.backbone.pooling is None
    assert typed("stage2", "experiment=t5_encoder_only").backbone.encoder_only
    for size in (16, 64, 256):
        assert typed("stage1", f"experiment=bottleneck_{size}").adapter.size_for(768) == size
    for command in ("stage1", "stage2"):
        config = typed(command, "experiment=equal_budget")
        assert (config.trainer.max_epochs, config.optim.patience) == (10, 3)


@pytest.mark.parametrize("name", sorted(file.stem for file in (conf_folder() / "debug").glob("*.yaml")))
@pytest.mark.parametrize("command", ["stage1", "stage2"])
def test_a_debug_run_has_no_logger_and_does_not_resume(command: str, name: str) -> None:
    config = typed(command, f"debug={name}", "experiment=quick")  # beside an experiment, and after it
    assert dataclasses.asdict(config.logger) == {"wandb": None, "csv": None}
    assert (config.overwrite, config.resume) == (True, False)
    assert typed(command, f"debug={name}", "logger=csv").logger.csv is not None
    assert typed(command, "debug=limit", "experiment=quick").trainer.max_epochs == 2


def test_every_key_is_in_the_list_of_keys() -> None:
    keys = keys_of(Stage1Config)
    assert {"seed", "optim.lr", "data.limit.train", "task.hub.path", "logger.wandb.project"} <= set(keys)


def test_task_files_hold_data_only() -> None:
    for file in sorted((conf_folder() / "task").glob("*.yaml")):
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        assert set(content) <= {f.name for f in dataclasses.fields(TaskConfig)} - {"name"}, file.name
        assert "_target_" not in file.read_text(encoding="utf-8")
        assert not Path(str(content.get("hub", {}).get("path", ""))).is_absolute()


@pytest.mark.parametrize("values", [{"kind": "[" * 3000}, {"metrics": ["x" * 3000]}], ids=["kind", "metrics"])
def test_a_long_value_of_a_task_file_is_shortened(values: dict[str, Any]) -> None:
    task = {"kind": "classification", "text": "t", "labels": ["a", "b"], "metrics": ["accuracy"]} | values
    with pytest.raises(UserError, match=r"\.\.\.") as refused:
        TaskConfig(name="mine", **task)
    assert len(str(refused.value)) < 500
