"""What vLLM's own classes hold after loading, written by plain gloo processes without starting an engine.

Runs in the engines' environment. Reads jobs as JSON lines on stdin, answers each with a JSON line on stdout:
{"model": DIR, "tp": N, "pp": N, "ep": BOOL, "load_format": "auto" | "sharded_state", "out": DIR, "roomy": BOOL,
"draft": BOOL, "partial": BOOL, "pooling": BOOL, "again": {DIR: OUT}} → {"ok": true} or {"error": TEXT}. roomy:
parameters may be larger than what is loaded. draft: of the model that vLLM makes of the layers which predict further
tokens. partial: what the loader leaves unset or adds is written too, the latter named in the files' metadata. pooling:
of a model that generates nothing. again: checkpoints of the same model, which are loaded one after another over the
first, and where their parameters go.
Each rank writes OUT/rank-N.safetensors: the tensors that `ShardedStateLoader` of a fresh model would look for.
vLLM keeps state between models of one process, so every job runs in forked processes of its own.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import re
import signal
import sys
import traceback
from collections import defaultdict
from contextlib import suppress
from enum import EnumMeta
from pathlib import Path
from types import FunctionType

os.environ |= {
    "GLOO_SOCKET_IFNAME": "lo",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}

import small_timm
import torch
from gpu_classes import everywhere, without_gpus
from safetensors.torch import save_file
from transformers import AutoConfig, LlamaConfig, PreTrainedConfig
from vllm import ModelRegistry
from vllm.config import set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.fused_moe import oracle
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.sharded_state_loader import ShardedStateLoader
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.models import registry
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.transformers_utils.config import _CONFIG_REGISTRY
from vllm.transformers_utils.configs.radio import VIT_TIMM_DIM_BY_NAME
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm.v1.attention import selector

SHARED = "tpshard-"
UNSET = 7.0
"""Parameters hold this before loading, so that one that the loader leaves out is seen."""
_BACKENDS = {
    "fp8": "TRITON",
    "int8": "TRITON",
    "mxfp4": "TRITON",
    "mxfp8": "MARLIN",
    "nvfp4": "MARLIN",
    "wna16": "MARLIN",
}
"""Which kernels of experts a quantised model is taken to have, by vLLM's module that chooses."""
_OWN_VALUES = re.compile(
    r".*attn\.([qkv]|prob)_(scale|zero_point)|.*\.w(13|2)_(bias|input_global_scale)"
    r"|vision_model\.model\.encoder\.layers\.\d+\.ls[12]"
)
"""Parameters that keep the value that they were made with, where a quantised checkpoint has none for them."""
_NO_VALUES = re.compile(r".*\.w(13|2)_input_scale")
"""Parameters that are made with whatever lay in memory, where weights alone are quantised; compared as 1."""
_PADDED = re.compile(r".*\.(attn_sink|in_proj_qkvgfab\.weight)")
"""Parameters that may be larger than what is loaded, and keep there what they were made with."""
_WIDER = re.compile(r".*\.(w(13|2)_weight|input_mix_weight_down_block_inject\.weight)")
"""Those that keep there whatever lay in memory, and of which nobody reads it or it must be 0: compared as 0."""


class NoKernel:
    """In place of a kernel: loading needs none, and a CPU has none for most methods."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)

    def input_quant_key(self) -> None: ...

    @staticmethod
    def is_supported(*_: object) -> tuple[bool, None]:
        return True, None


class NoSparseAttention(NoKernel):
    """In place of a backend of sparse attention, and of what it makes: a CPU has none."""

    is_sparse = True
    supports_dense_mha_prefill = False
    dcp_world_size = 1

    @staticmethod
    def get_name() -> str:
        return "none"

    @staticmethod
    def is_mla() -> bool:
        return True

    @staticmethod
    def supports_sink() -> bool:
        return True

    @classmethod
    def get_impl_cls(cls) -> type[NoSparseAttention]:
        return cls


def as_on_gpus() -> None:
    """Have the classes that vLLM takes on GPUs where it has others for CPUs: their parameters have other names."""
    from vllm.models.deepseek_v32.nvidia.model import DeepseekV32ForCausalLM
    from vllm.models.deepseek_v32.nvidia.mtp import DeepseekV32MTP

    ModelRegistry.register_model("DeepseekV32MTPModel", DeepseekV32MTP)
    for name in ("DeepseekV32ForCausalLM", "GlmMoeDsaForCausalLM"):
        ModelRegistry.register_model(name, DeepseekV32ForCausalLM)
    without_gpus(ModelRegistry.register_model)
    importlib.import_module("vllm.models.hy_v4")  # whose classes ask for a backend too
    note = importlib.import_module("vllm.models.dots3_note.nvidia.model")
    note.Dots3NotePaddedSparseBackend = note.Dots3NoteTritonMLABackend = NoSparseAttention  # type: ignore[attr-defined]
    chosen = selector.get_attn_backend

    def backend(*sizes: object, use_sparse: bool = False, **options: object) -> object:
        return NoSparseAttention if use_sparse else chosen(*sizes, **options)

    everywhere("get_attn_backend", chosen, backend)
    asked = cached_tokenizer_from_config
    everywhere(asked.__name__, asked, lambda *given, **options: asked(*given, **options) or NoTokenizer())
    # Without one, classes with towers are asked for no processor of pictures, which reads files that no test has.
    vars(importlib.import_module("vllm.multimodal.registry"))[asked.__name__] = asked


def without_kernels() -> None:
    """Let quantised models be made and loaded on a machine that cannot run them; what they hold then is the same."""
    import vllm.model_executor.kernels.linear as linear
    import vllm.model_executor.layers.fused_moe.config as experts
    import vllm.model_executor.layers.quantization.utils.marlin_utils as marlin
    import vllm.triton_utils.allocation as triton

    checked = experts.FusedMoEConfig.__post_init__

    def unchecked(config: experts.FusedMoEConfig) -> None:
        with suppress(NotImplementedError):  # of experts without a gate
            checked(config)

    experts.FusedMoEConfig.__post_init__ = unchecked

    stubs: dict[object, object] = {marlin.verify_marlin_supported: lambda *_, **__: None}
    stubs[triton.set_triton_allocator] = lambda *_: None
    for name, chooser in vars(linear).items():
        if re.fullmatch(r"init_\w+_linear_kernel", name):
            stubs[chooser] = NoKernel
        elif name == "choose_mp_linear_kernel":
            stubs[chooser] = lambda *_, **__: NoKernel
    for name, kind in _BACKENDS.items():
        module = importlib.import_module(f"{oracle.__name__}.{'int_' if name == 'wna16' else ''}{name}")
        backends = next(
            each for each in vars(module).values() if isinstance(each, EnumMeta) and kind in each.__members__
        )
        chosen = (backends[kind], NoKernel)
        stubs[vars(module)[f"select_{name}_moe_backend"]] = lambda *_, chosen=chosen, **__: chosen
    unquantized = importlib.import_module(f"{oracle.__name__}.unquantized")
    found = unquantized.select_unquantized_moe_backend

    def selected(*arguments: object, **options: object) -> object:
        with suppress(NotImplementedError):
            return found(*arguments, **options)
        return unquantized.UnquantizedMoeBackend.TRITON, NoKernel

    stubs[found] = selected
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("vllm."):
            for name, value in list(vars(module).items()):
                if isinstance(value, FunctionType) and value in stubs:
                    setattr(module, name, stubs[value])


def in_this_process() -> None:
    """Have vLLM look at its classes here, where what this file took out is out, and not in a process of its own."""
    registry._run_in_subprocess = lambda ask: ask()


class Published(PreTrainedConfig):
    """A config with whatever keys it has, and those that it nests."""

    def __init__(self, **given: object) -> None:
        nested = {key: each for key, each in given.items() if key.endswith("_config") and isinstance(each, dict)}
        kept = {key: nested[key] for key in ("quantization_config",) if key in nested}
        super().__init__(**{key: each for key, each in given.items() if key not in nested}, **kept)
        for key in nested.keys() - kept.keys():
            inner = dict(nested[key])  # type: ignore[call-overload]
            known = inner.get("model_type") in _CONFIG_REGISTRY
            setattr(self, key, (_CONFIG_REGISTRY[inner["model_type"]] if known else PreTrainedConfig)(**inner))


class AroundNemotron(Published):
    """The same with Nemotron-H's config in it."""

    model_type = "NemotronH_Nano_VL_V2"

    def __init__(self, llm_config: dict[str, object] | None = None, **given: object) -> None:
        super().__init__(**given)
        self.llm_config = AutoConfig.for_model(**(llm_config or {"model_type": "nemotron_h"}))


def with_small_towers() -> None:
    """Have the tower that DeepSeek-VL2's class takes from timm made of a small one, in the process that makes it."""
    from vllm.model_executor.models.deepseek_vl2 import DeepseekVLV2ForCausalLM

    made = DeepseekVLV2ForCausalLM._init_vision_module

    def of_small_timm(self: DeepseekVLV2ForCausalLM, *given: object, **options: object) -> torch.nn.Module:
        sys.modules["timm"] = small_timm
        return made(self, *given, **options)

    DeepseekVLV2ForCausalLM._init_vision_module = of_small_timm
    VIT_TIMM_DIM_BY_NAME["vit_base_patch16_224"] = (192, 2, 12, 384)  # Nemotron VL's, as `engine_newest.py` has it


class NoTokenizer:
    """In place of a tokenizer, of which some classes ask the numbers of a few tokens while they are made."""

    vocab: defaultdict[str, int] = defaultdict(int)

    def encode(self, *_: object, **__: object) -> list[int]:
        return [0]


def with_configs() -> None:
    """Let AutoConfig read what is published with code of its own for it, or is younger than transformers here."""
    for name in (
        *("internlm2", "internlm3", "exaone", "iquestcoder", "bailing_moe_v2"),
        *("minicpm", "bailing_moe", "bailing_hybrid", "bailing_moe_v3", "llama_bidirec"),
    ):
        AutoConfig.register(name, type(f"{name}Config", (LlamaConfig,), {"model_type": name}))
    AutoConfig.register("nemotron-nas", SearchedConfig)
    AutoConfig.register(AroundNemotron.model_type, AroundNemotron)
    # Published for newer classes than transformers', whose own configs have other keys: molmo2, step3p7.
    for name in ("ernie4_5_moe_vl", "mimo_v2", "phi4mm", "molmo2", "step3p7"):
        own = {"model_type": name, "__init__": Published.__init__}  # a config's class else gets one made of its fields
        AutoConfig.register(name, type(f"{name}Config", (Published,), own), exist_ok=True)


class Attributes(dict):
    """A part of a config whose keys are attributes."""

    def __getattr__(self, key: str) -> object:
        if key not in self:
            raise AttributeError(key)
        return Attributes(self[key]) if isinstance(self[key], dict) else self[key]


class SearchedConfig(LlamaConfig):
    """The config of layers found by search, as its published class has it."""

    model_type = "nemotron-nas"

    def __post_init__(self, **given: object) -> None:
        super().__post_init__(**given)
        self.block_configs = [Attributes(block) for block in vars(self).get("block_configs", ())]


class Complaints(logging.Handler):
    """Collects what the loader warns of: another shape or dtype than the parameter's."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def load(job: dict[str, object], rank: int, meeting: Path) -> None:
    """One rank's model, loaded and written; raises for whatever vLLM refuses, and for a parameter left unset.

    meeting: a file where the ranks find each other; of ports another process may be quicker.
    """
    os.environ["VLLM_DIST_IDENT"] = f"{SHARED}{os.getppid()}"  # names the memory in which stages meet
    tp, pp, load_format = int(str(job["tp"])), int(str(job["pp"])), str(job["load_format"])
    arguments = EngineArgs(
        model=str(job["model"]),
        skip_tokenizer_init=True,
        tensor_parallel_size=tp,
        pipeline_parallel_size=pp,
        enable_expert_parallel=bool(job["ep"]),
        load_format=load_format,
        config_format="auto" if Path(str(job["model"]), "config.json").exists() else "mistral",
        enforce_eager=True,
        enable_prefix_caching=False,  # else hybrid models with latent attention ask for a processor with AMX
        max_model_len=64,
        runner="pooling" if job.get("pooling") else "auto",
        speculative_config={"method": "mtp", "num_speculative_tokens": 1} if job.get("draft") else None,
    )
    config = arguments.create_engine_config()
    described = config.speculative_config.draft_model_config if job.get("draft") else config.model_config
    complaints = Complaints()
    os.environ["VLLM_DIST_IDENT"] = str(rank)  # no two agree on it, so none shares memory with others
    logging.getLogger(ShardedStateLoader.__module__).addHandler(complaints)
    with set_current_vllm_config(config):
        init_distributed_environment(tp * pp, rank, f"file://{meeting.absolute()}", rank, backend="gloo")
        initialize_model_parallel(tp, pp)
        with set_default_torch_dtype(config.model_config.dtype), torch.device("cpu"):
            model = initialize_model(vllm_config=config, model_config=described)
        fresh = set(ShardedStateLoader._filter_subtensors(model.state_dict()))
        made = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        for parameter in model.parameters():
            parameter.data.fill_(UNSET)
        loader = ShardedStateLoader if load_format == "sharded_state" else DefaultModelLoader
        loader(config.load_config).load_weights(model, described)
        held = ShardedStateLoader._filter_subtensors(model.state_dict())
    added, removed = sorted(set(held) - fresh), sorted(fresh - set(held))
    if (added or removed) and not job["partial"]:
        raise RuntimeError(f"loading adds or removes {sorted(fresh ^ set(held))}")
    unset = [name for name in made if name in held and (held[name].double() == UNSET).all()]
    own = {name for name in unset if _OWN_VALUES.fullmatch(name) or made[name].double().isnan().all()}
    for name in own:
        held[name] = made[name]
    for name in filter(_NO_VALUES.fullmatch, unset):
        held[name] = torch.ones_like(held[name])
        own.add(name)
    unset = [name for name in unset if held[name].numel() > 1 and name not in own]
    padded = (made.keys() & held.keys()) - {*own, *unset}
    if not job["partial"]:
        set_behind(held, made, padded)
    if unset and not job["partial"]:
        raise RuntimeError(f"not loaded: {unset}")
    complaints.lines = [line for line in complaints.lines if "dtype" not in line]
    if load_format == "sharded_state" and complaints.lines and not job["roomy"]:
        raise RuntimeError("; ".join(complaints.lines))
    metadata = {"added": json.dumps(added)}
    tensors = {name: tensor.detach().clone() for name, tensor in held.items()}
    save_file(tensors, f"{job['out']}/rank-{rank}.safetensors", metadata=metadata)
    for directory, out in dict(job["again"]).items():
        with set_current_vllm_config(config):
            for name, parameter in model.named_parameters():
                parameter.data.copy_(made[name]) if name in own else parameter.data.fill_(UNSET)
            config.model_config.model = directory
            loader(config.load_config).load_weights(model, config.model_config)
            held = ShardedStateLoader._filter_subtensors(model.state_dict())
            if not job["partial"]:
                set_behind(held, made, padded)
        tensors = {name: tensor.detach().clone() for name, tensor in held.items()}
        Path(out).mkdir(parents=True, exist_ok=True)
        save_file(tensors, f"{out}/rank-{rank}.safetensors", metadata=metadata)


def set_behind(held: dict[str, torch.Tensor], made: dict[str, torch.Tensor], names: set[str]) -> None:
    """Give parameters that are larger than what was loaded what they have behind it. made: what they were made with.

    Behind it whole rows or columns are unset; one element of what was loaded may be the same number.
    """
    for name in names:
        if _PADDED.fullmatch(name) or _WIDER.fullmatch(name):
            behind = made[name] if _PADDED.fullmatch(name) else torch.zeros_like(made[name])
            unset = held[name].double() == UNSET
            if unset.dim() > 1:
                unset = unset.all(-1, keepdim=True) | unset.all(-2, keepdim=True)
            held[name] = torch.where(unset, behind, held[name])


def run(job: dict[str, object]) -> dict[str, object]:
    """Run a job in one forked process a rank, and say how it went: of the first that fails, whom no other waits for."""
    out = Path(str(job["out"]))
    out.mkdir(parents=True, exist_ok=True)
    for left in (out / "meeting", *out.glob("error-*.txt")):
        left.unlink(missing_ok=True)
    children = {}
    for rank in range(int(str(job["tp"])) * int(str(job["pp"]))):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.dup2(2, 1)  # stdout is for answers
                load(job, rank, out / "meeting")
                status = 0
            except BaseException:
                (out / f"error-{rank}.txt").write_text(traceback.format_exc())
            finally:
                os._exit(status)
        children[child] = rank
    failed = None
    while children:
        child, status = os.wait()
        rank = children.pop(child)
        if status and failed is None:
            failed = rank
            for other in children:
                os.kill(other, signal.SIGKILL)
    for left in Path("/dev/shm").glob(f"*{SHARED}{os.getpid()}*"):  # forked processes that end at once leave it
        left.unlink()
    if failed is None:
        return {"ok": True}
    text = out / f"error-{failed}.txt"
    return {"error": text.read_text() if text.exists() else "the process was killed"}


def main() -> None:
    """Answer jobs until stdin ends."""
    torch.set_num_threads(1)
    without_kernels()
    as_on_gpus()
    in_this_process()
    with_configs()
    with_small_towers()
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
