"""What megatron-core itself makes and takes; run in its own environment, where tpshard is not installed.

    python tests/megatron/worker.py save HF OUT --tp 2 --pp 2     GPTModel with a checkpoint's weights, saved by it
    python tests/megatron/worker.py load HF OUT --tp 2 --pp 2     the same weights loaded from OUT, bit for bit
    python tests/megatron/worker.py logits HF OUT                 its forward pass beside transformers', one process

Without arguments it reads such lines. With --legacy there is a file for each rank, which is loaded by torch with
Megatron's list of safe names, and strictly.

The weights are put into the model by slices of their own, which share nothing with tpshard. On CPUs, with gloo and the
layers that need no Transformer Engine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import warnings
from math import lcm
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

warnings.filterwarnings("ignore")
# Megatron asks for these on its way to a file or through an expert, also where there is no GPU.
torch.cuda.synchronize = lambda *a, **k: None  # type: ignore[assignment]
torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment,return-value]
torch.cuda.Stream = type("Stream", (), {})  # type: ignore[assignment,misc]
torch.Tensor.cuda = lambda self, *a, **k: self  # type: ignore[method-assign,assignment]


def read(model: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Config and tensors of a Hugging Face checkpoint."""
    from safetensors.torch import load_file

    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(model.glob("*.safetensors")):
        tensors |= load_file(file)
    return json.loads((model / "config.json").read_text()), tensors


def megatron_args(c: dict[str, Any], padded: int) -> dict[str, Any]:
    """The arguments that describe a model to Megatron, under the names of its command line."""
    kind = c["model_type"]
    heads = c.get("num_attention_heads") or c["n_head"]
    hidden = c.get("hidden_size") or c["n_embd"]
    experts = c.get("num_local_experts") or c.get("num_experts") or c.get("n_routed_experts")
    gpt2, nemotron = kind == "gpt2", kind == "nemotron"
    theta = c.get("rope_theta") or (c.get("rope_parameters") or {}).get("rope_theta", 10000.0)
    args: dict[str, Any] = {
        "num_layers": c.get("num_hidden_layers") or c["n_layer"],
        "hidden_size": hidden,
        "ffn_hidden_size": c.get("intermediate_size") or 4 * hidden,
        "num_attention_heads": heads,
        "group_query_attention": c.get("num_key_value_heads", heads) != heads,
        "num_query_groups": c.get("num_key_value_heads") or heads,
        "kv_channels": c.get("head_dim") or hidden // heads,
        "max_position_embeddings": c.get("max_position_embeddings") or c["n_positions"],
        "position_embedding_type": "learned_absolute" if gpt2 else "rope",
        "rotary_base": int(theta),
        "rotary_percent": c.get("partial_rotary_factor", 0.5) if nemotron else 1.0,
        "norm_epsilon": c.get("rms_norm_eps") or c.get("layer_norm_epsilon") or c.get("norm_eps"),
        "normalization": "LayerNorm" if gpt2 or nemotron else "RMSNorm",
        "apply_layernorm_1p": nemotron,
        "swiglu": not (gpt2 or nemotron),
        "squared_relu": nemotron,
        "add_bias_linear": gpt2,
        "add_qkv_bias": kind in ("qwen2", "qwen2_moe"),
        "qk_layernorm": kind in ("qwen3", "qwen3_moe"),
        "untie_embeddings_and_output_weights": not c.get("tie_word_embeddings", gpt2),
        "padded_vocab_size": padded,
        "num_experts": experts,
        "mtp_num_layers": (c.get("num_nextn_predict_layers") or None) if kind == "deepseek_v3" else None,
    }
    if "kv_lora_rank" in c:
        args |= {
            "multi_latent_attention": True,
            "qk_layernorm": True,
            "q_lora_rank": c["q_lora_rank"],
            "kv_lora_rank": c["kv_lora_rank"],
            "qk_head_dim": c["qk_nope_head_dim"],
            "qk_pos_emb_head_dim": c["qk_rope_head_dim"],
            "v_head_dim": c["v_head_dim"],
            "kv_channels": hidden // heads,
        }
    if experts and "n_routed_experts" in c:
        dense, shared = c["first_k_dense_replace"], c["n_shared_experts"]
        v3 = kind == "deepseek_v3"
        args |= {
            "moe_ffn_hidden_size": c["moe_intermediate_size"],
            "moe_router_topk": c["num_experts_per_tok"],
            "moe_layer_freq": [0] * dense + [1] * (args["num_layers"] - dense),
            "moe_router_pre_softmax": True,
            "moe_shared_expert_intermediate_size": shared * c["moe_intermediate_size"],
            "moe_router_score_function": "sigmoid" if v3 else "softmax",
            "moe_router_enable_expert_bias": v3,
            "moe_router_topk_scaling_factor": c["routed_scaling_factor"],
            "moe_router_num_groups": c["n_group"],
            "moe_router_group_topk": c["topk_group"],
        }
    elif experts:
        args |= {
            "moe_ffn_hidden_size": c.get("moe_intermediate_size") or c["intermediate_size"],
            "moe_router_topk": c["num_experts_per_tok"],
            "moe_layer_freq": 1,
            "moe_router_pre_softmax": kind != "mixtral" and not c.get("norm_topk_prob", False),
            "moe_shared_expert_intermediate_size": c.get("shared_expert_intermediate_size"),
        }
    return args


def build(args: dict[str, Any], tp: int, pp: int, ep: int, etp: int, vpp: int) -> list[Any]:
    """Megatron's GPTModel, this rank's part of it: one, or one for each of its virtual stages."""
    import torch.nn.functional as F
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_decoder_block_spec,
        get_gpt_layer_local_spec,
        get_gpt_mtp_block_spec,
    )
    from megatron.core.parallel_state import is_pipeline_first_stage, is_pipeline_last_stage
    from megatron.core.transformer import MLATransformerConfig, TransformerConfig

    experts, latent = args["num_experts"], args.get("multi_latent_attention", False)
    more: dict[str, Any] = {}
    if latent:
        names = ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")
        more = {"multi_latent_attention": True, "rope_type": "rope", "rotary_base": args["rotary_base"]}
        more |= {name: args[name] for name in names}
    if args.get("moe_router_score_function"):
        names = ("score_function", "enable_expert_bias", "topk_scaling_factor", "num_groups", "group_topk")
        more |= {f"moe_router_{name}": args[f"moe_router_{name}"] for name in names}
    config = (MLATransformerConfig if latent else TransformerConfig)(
        **more,
        moe_layer_freq=args.get("moe_layer_freq", 1),
        mtp_num_layers=args["mtp_num_layers"],
        virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None,
        num_layers=args["num_layers"],
        hidden_size=args["hidden_size"],
        ffn_hidden_size=args["ffn_hidden_size"],
        num_attention_heads=args["num_attention_heads"],
        num_query_groups=args["num_query_groups"],
        kv_channels=args["kv_channels"],
        normalization=args["normalization"],
        layernorm_epsilon=args["norm_epsilon"],
        gated_linear_unit=args["swiglu"],
        activation_func=F.silu if args["swiglu"] else lambda x: F.gelu(x, approximate="tanh"),
        bias_activation_fusion=False,
        add_bias_linear=args["add_bias_linear"],
        add_qkv_bias=args["add_qkv_bias"],
        qk_layernorm=args["qk_layernorm"],
        num_moe_experts=experts,
        moe_ffn_hidden_size=args.get("moe_ffn_hidden_size"),
        moe_router_topk=args.get("moe_router_topk", 2),
        moe_router_pre_softmax=args.get("moe_router_pre_softmax", False),
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="allgather",
        moe_shared_expert_intermediate_size=args.get("moe_shared_expert_intermediate_size"),
        moe_shared_expert_gate=bool(args.get("moe_shared_expert_intermediate_size")) and not latent,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        perform_initialization=False,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp if experts else None,
        pipeline_dtype=torch.float32,
        params_dtype=args["params_dtype"],
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
    )
    if latent:
        from stubs import latent as without_te

        def spec(stage: int | None) -> Any:
            return without_te(get_gpt_decoder_block_spec(config, False, config.normalization, vp_stage=stage))
    else:

        def spec(stage: int | None) -> Any:
            return get_gpt_layer_local_spec(
                num_experts=experts,
                moe_grouped_gemm=False,
                qk_layernorm=args["qk_layernorm"],
                normalization=config.normalization,
            )

    models = []
    for stage in range(vpp):
        where = {"ignore_virtual": vpp == 1, "vp_stage": stage if vpp > 1 else None}
        own = spec(where["vp_stage"])
        mtp = get_gpt_mtp_block_spec(config, own, False, where["vp_stage"]) if config.mtp_num_layers else None
        models.append(
            GPTModel(
                config=config,
                transformer_layer_spec=own,
                vocab_size=args["padded_vocab_size"],
                max_sequence_length=args["max_position_embeddings"],
                position_embedding_type=args["position_embedding_type"],
                rotary_base=args["rotary_base"],
                rotary_percent=args["rotary_percent"],
                share_embeddings_and_output_weights=not args["untie_embeddings_and_output_weights"],
                pre_process=is_pipeline_first_stage(**where),
                post_process=is_pipeline_last_stage(**where),
                mtp_block_spec=mtp,
                parallel_output=False,
                vp_stage=where["vp_stage"],
            )
        )
    return models


def padded_rows(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """With its last row repeated, as Megatron's own converter pads a vocabulary."""
    return torch.cat([tensor, tensor[-1:].expand(rows - len(tensor), -1)])


LATENT = {
    "self_attention.linear_q_proj": "q_proj",
    "self_attention.linear_q_down_proj": "q_a_proj",
    "self_attention.linear_q_up_proj": "q_b_proj",
    "self_attention.q_layernorm": "q_a_layernorm",
    "self_attention.linear_kv_down_proj": "kv_a_proj_with_mqa",
    "self_attention.linear_kv_up_proj": "kv_b_proj",
    "self_attention.kv_layernorm": "kv_a_layernorm",
}
"""Parameters of latent attention, and Hugging Face's names for them."""


class Wanted:
    """What each parameter of Megatron's model is, of a Hugging Face checkpoint."""

    def __init__(self, config: dict[str, Any], tensors: dict[str, torch.Tensor], args: dict[str, Any]) -> None:
        self.kind, self.tensors, self.args = config["model_type"], tensors, args

        self.latent = args.get("multi_latent_attention", False)
        self.shared = "shared_experts" if self.latent else "shared_expert"

    def named(self, *names: str) -> torch.Tensor:
        return next(self.tensors[name] for name in names if name in self.tensors)

    def whole(self, name: str, first_expert: int) -> torch.Tensor:
        """A parameter of the whole model; `name` has the model's layer number and the rank's expert number."""
        v, gpt2 = self.args["padded_vocab_size"], self.kind == "gpt2"
        embedding = ("model.embed_tokens.weight", "transformer.wte.weight", "wte.weight")
        if name == "embedding.word_embeddings.weight":
            return padded_rows(self.named(*embedding), v)
        if name == "output_layer.weight":
            return padded_rows(self.named("lm_head.weight", *embedding), v)
        if name == "embedding.position_embeddings.weight":
            return self.named("transformer.wpe.weight", "wpe.weight")
        module, _, suffix = name.rpartition(".")
        if module == "decoder.final_layernorm":
            return self.named(f"model.norm.{suffix}", f"transformer.ln_f.{suffix}", f"ln_f.{suffix}")
        _, _, layer, *rest = module.split(".")
        inside = ".".join(rest)
        if gpt2:
            at = f"transformer.h.{layer}." if "transformer.wte.weight" in self.tensors else f"h.{layer}."
            if inside == "self_attention.linear_qkv":
                tensor = self.tensors[f"{at}attn.c_attn.{suffix}"]
                tensor = tensor.t() if suffix == "weight" else tensor
                return self.qkv(*tensor.chunk(3))
            names = {
                "self_attention.linear_proj": "attn.c_proj",
                "mlp.linear_fc1": "mlp.c_fc",
                "mlp.linear_fc2": "mlp.c_proj",
                "input_layernorm": "ln_1",
                "pre_mlp_layernorm": "ln_2",
            }
            tensor = self.tensors[f"{at}{names[inside]}.{suffix}"]
            return tensor.t() if tensor.dim() == 2 else tensor
        at = f"model.layers.{layer}."
        if module.startswith("mtp."):
            at = f"model.layers.{self.args['num_layers'] + int(layer)}."
            rest = rest[1:] if rest[0] == "transformer_layer" else rest
            inside = ".".join(rest)
            outer = {"final_layernorm": "shared_head.norm"} | {name: name for name in ("enorm", "hnorm", "eh_proj")}
            if inside in outer:
                return self.tensors[f"{at}{outer[inside]}.weight"]
        if self.latent and inside in LATENT:
            return self.tensors[f"{at}self_attn.{LATENT[inside]}.weight"]
        if suffix == "expert_bias":
            return self.tensors[f"{at}mlp.gate.e_score_correction_bias"]
        if inside == "self_attention.linear_qkv":
            return self.qkv(*(self.tensors[f"{at}self_attn.{p}_proj.{suffix}"] for p in "qkv"))
        moe = "block_sparse_moe" if self.kind == "mixtral" else "mlp"
        gate, up, down = ("w1", "w3", "w2") if self.kind == "mixtral" else ("gate_proj", "up_proj", "down_proj")
        if inside.startswith("mlp.experts.local_experts"):
            expert = first_expert + int(rest[3])
            at += f"{moe}.experts.{expert}."
            if rest[4] == "linear_fc2":
                return self.tensors[f"{at}{down}.weight"]
            return torch.cat([self.tensors[f"{at}{gate}.weight"], self.tensors[f"{at}{up}.weight"]])
        if inside == "self_attention.linear_proj":
            return self.tensors[f"{at}self_attn.o_proj.{suffix}"]
        names = {
            "self_attention.q_layernorm": "self_attn.q_norm",
            "self_attention.k_layernorm": "self_attn.k_norm",
            "input_layernorm": "input_layernorm",
            "pre_mlp_layernorm": "post_attention_layernorm",
            "mlp.linear_fc2": "mlp.down_proj",
            "mlp.router": f"{moe}.gate",
            "mlp.shared_experts.linear_fc2": f"mlp.{self.shared}.down_proj",
        }
        if inside == "mlp.shared_experts" and suffix == "gate_weight":
            return self.tensors[f"{at}mlp.shared_expert_gate.weight"]
        if inside in ("mlp.linear_fc1", "mlp.shared_experts.linear_fc1"):
            if not self.args["swiglu"]:
                return self.tensors[f"{at}mlp.up_proj.{suffix}"]
            below = "mlp." if inside == "mlp.linear_fc1" else f"mlp.{self.shared}."
            return torch.cat([self.tensors[f"{at}{below}{p}_proj.{suffix}"] for p in ("gate", "up")])
        return self.tensors[f"{at}{names[inside]}.{suffix}"]

    def qkv(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Of each KV group its heads of q, then k, then v."""
        groups = self.args["num_query_groups"]
        parts = [t.reshape(groups, -1, *q.shape[1:]) for t in (q, k, v)]
        return torch.cat(parts, dim=1).reshape(-1, *q.shape[1:])

    def part(self, name: str, shape: torch.Size, tp: int, rank: int, first_expert: int) -> torch.Tensor:
        """The share of a rank, whose parameter has this shape."""
        tensor = self.whole(name, first_expert)
        if "linear_fc1" in name and self.args["swiglu"]:
            tensor = torch.cat([half.chunk(tp)[rank] for half in tensor.chunk(2)])
        elif tensor.shape != shape:
            dim = next(d for d, (a, b) in enumerate(zip(tensor.shape, shape, strict=True)) if a != b)
            tensor = tensor.chunk(tp, dim)[rank]
        assert tensor.shape == shape, (name, tensor.shape, shape)
        return tensor


def parameters(model: Any, wanted: Wanted, tp: int, ep: int, etp: int) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """The model's parameters on this rank, each with what it must be; and what the router adds in order to choose."""
    from megatron.core import parallel_state as state

    first = model.decoder.layers[0].layer_number - 1 if len(model.decoder.layers) else 0
    expert = state.get_expert_model_parallel_rank() * ((wanted.args["num_experts"] or 0) // ep)
    found = []
    biases = [(name, each) for name, each in model.named_buffers() if name.endswith("expert_bias")]
    for name, parameter in [*model.named_parameters(), *biases]:
        whole = name
        if name.startswith("decoder.layers."):
            _, _, local, rest = name.split(".", 3)
            whole = f"decoder.layers.{first + int(local)}.{rest}"
        rank = (tp, state.get_tensor_model_parallel_rank())
        if ".local_experts." in name:
            rank = (etp, state.get_expert_tensor_parallel_rank())
        part = wanted.part(whole, parameter.shape, *rank, expert)
        found.append((name, parameter, part))
    return found


def te_name(name: str, sparse: bool, latent: bool) -> str:
    """The name that a norm has with layers of Transformer Engine, most of which have norms inside."""
    if not sparse:
        name = name.replace(".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_")
    if not latent:
        return name.replace(".input_layernorm.", ".self_attention.linear_qkv.layer_norm_")
    for which in ("q", "kv"):
        within = f".self_attention.linear_{which}_up_proj.layer_norm_"
        name = name.replace(f".self_attention.{which}_layernorm.", within)
    return name


def te_names(names: Any, latent: bool) -> dict[str, str]:
    """The names of a state dict's entries, and those of Transformer Engine's layers."""
    routed = {name.partition(".mlp.router.")[0] for name in names if ".mlp.router." in name}
    return {name: te_name(name, name.partition(".pre_mlp_layernorm.")[0] in routed, latent) for name in names}


def sharded(model: Any, args: dict[str, Any], singly: bool) -> dict[str, Any]:
    """The model's tensors as Megatron saves and loads them, in files that carry the names of Transformer Engine."""
    metadata = {"dp_cp_group": parallel_group()} | ({"non_homogeneous_layers": True} if singly else {})
    state = model.sharded_state_dict(metadata=metadata)
    if args.get("multi_latent_attention"):
        names = te_names([value.key for value in state.values()], True)
        for value in state.values():
            value.key = names[value.key]
    elif args["num_experts"]:  # the local layers give the norm before experts a name that only dense layers have
        for value in state.values():
            value.key = value.key.replace("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")
    return state


def parallel_group() -> Any:
    from megatron.core import parallel_state

    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def legacy_file(directory: Path, pp: int, ep: int) -> Path:
    """This rank's file, as megatron/training/checkpointing.py names it."""
    from megatron.core import parallel_state as state

    coordinate = f"{state.get_tensor_model_parallel_rank():02}"
    coordinate += f"_{state.get_pipeline_model_parallel_rank():03}" if pp > 1 else ""
    coordinate += f"_{state.get_expert_model_parallel_rank():03}" if ep > 1 else ""
    return directory / f"mp_rank_{coordinate}" / "model_optim_rng.pt"


def load_legacy(model: Any, path: Path, args: dict[str, Any]) -> None:
    """Load a file as Megatron-LM does it, its norms under the names that the local layers have. Nothing may be left."""
    from megatron.core.safe_globals import register_safe_globals

    register_safe_globals()
    state = torch.load(path, map_location="cpu", weights_only=True)
    assert state["checkpoint_version"] == 3.0 and type(state["args"]) is argparse.Namespace
    for key in ("num_layers", "hidden_size", "num_attention_heads"):  # what its check_checkpoint_args compares
        assert getattr(state["args"], key) == args[key], key
    local = {te: name for name, te in te_names(model.state_dict(), bool(args.get("multi_latent_attention"))).items()}
    model.load_state_dict({local.get(name, name): tensor for name, tensor in state["model"].items()}, strict=True)


def run(rank: int, options: argparse.Namespace, store: str) -> None:
    """One process of a command."""
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.tensor_parallel import random as tp_random
    from megatron.core.transformer.moe import moe_utils

    torch.set_num_threads(1)
    tp, pp, ep, etp, vpp = options.tp, options.pp, options.ep, options.etp or options.tp, options.vpp
    world = lcm(tp, etp * ep) * pp
    dist.init_process_group("gloo", init_method=f"file://{store}/store", rank=rank, world_size=world)
    parallel_state.initialize_model_parallel(
        tp, pp, vpp if vpp > 1 else None, expert_model_parallel_size=ep, expert_tensor_parallel_size=etp
    )
    moe_utils.te_general_gemm = None  # it is asked whether there is one, and not there without Transformer Engine
    tp_random.get_cuda_rng_tracker().fork = lambda *a, **k: contextlib.nullcontext()
    config, tensors = read(options.model)
    multiple = 128 * tp
    vocab = config["vocab_size"]
    padded = options.padded or -(-vocab // multiple) * multiple
    args = megatron_args(config, padded)
    args["params_dtype"] = next(iter(tensors.values())).dtype
    models = build(args, tp, pp, ep, etp, vpp)
    if args["params_dtype"] != torch.float32:
        models = [model.to(args["params_dtype"]) for model in models]
    wanted = Wanted(config, tensors, args)
    found = [each for model in models for each in parameters(model, wanted, tp, ep, etp)]
    model = models[0]
    directory = options.directory / (options.name or "release")
    with torch.no_grad():
        if options.command == "save":
            for _, parameter, part in found:
                parameter.copy_(part)
            directory.mkdir(parents=True, exist_ok=True)
            given = argparse.Namespace(
                **args,
                tensor_model_parallel_size=tp,
                pipeline_model_parallel_size=pp,
                expert_model_parallel_size=ep,
                expert_tensor_parallel_size=etp,
                virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None,
                hybrid_layer_pattern=None,
            )
            common = {"args": given, "checkpoint_version": 3.0, "iteration": 7}
            if options.legacy:
                path = legacy_file(directory, pp, ep)
                path.parent.mkdir(exist_ok=True)
                states = [each.state_dict_for_save_checkpoint() for each in models]
                keys = ["model"] if vpp == 1 else [f"model{number}" for number in range(vpp)]
                torch.save({**common, **dict(zip(keys, states, strict=True))}, path)
            else:
                dist_checkpointing.save({**sharded(model, args, options.singly), **common}, str(directory))
            (options.directory / "latest_checkpointed_iteration.txt").write_text(
                directory.name.removeprefix("iter_").lstrip("0")
            )
        else:
            for _, parameter, _ in found:
                parameter.fill_(float("nan"))
            if options.legacy:
                load_legacy(model, legacy_file(directory, pp, ep), args)
            else:
                state = dist_checkpointing.load(sharded(model, args, options.singly), str(directory))
                model.load_state_dict(state, strict=False)
            count = 0
            for name, parameter, part in found:
                rows = slice(None)
                if part.dim() == 2 and len(part) * tp == padded and ("word_emb" in name or "output_layer" in name):
                    begin = parallel_state.get_tensor_model_parallel_rank() * len(part)
                    rows = slice(0, max(0, min(len(part), vocab - begin)))  # what pads a vocabulary is anything
                same = torch.equal(parameter[rows], part[rows])
                assert same, f"rank {rank}: {name} is not what the checkpoint has"
                count += 1
            print(f"rank {rank}: {count} parameters are equal, bit for bit", flush=True)
        if options.command == "logits":
            from transformers import AutoModelForCausalLM

            reference = AutoModelForCausalLM.from_pretrained(
                options.model, dtype=torch.float32, attn_implementation="eager"
            )
            tokens = torch.arange(12).reshape(1, -1) * 7 % vocab
            positions = torch.arange(12).reshape(1, -1)
            mask = torch.triu(torch.ones(12, 12, dtype=torch.bool), diagonal=1)[None, None]
            theirs = reference.eval()(tokens).logits
            found = {"largest": theirs.abs().max().item()}
            for name in ("difference", "otherwise"):
                ours = model.eval()(tokens, positions, mask)[..., :vocab]
                found[name] = (ours - theirs).abs().max().item()
                attention = model.decoder.layers[0].self_attention
                fused = attention.linear_kv_up_proj if args.get("multi_latent_attention") else attention.linear_qkv
                fused.weight.copy_(fused.weight.flip(0))  # so that a difference is seen
            print(json.dumps(found), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def parsed(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=("save", "load", "logits"))
    parser.add_argument("model", type=Path)
    parser.add_argument("directory", type=Path)
    for name in ("tp", "pp", "ep", "vpp"):
        parser.add_argument(f"--{name}", type=int, default=1)
    parser.add_argument("--etp", type=int, help="among how many ranks an expert is cut, if not among tp")
    parser.add_argument("--padded", type=int, help="the padded size of the vocabulary")
    parser.add_argument("--name", help="the folder of the iteration")
    parser.add_argument("--singly", action="store_true", help="a key for every layer, not one for all")
    parser.add_argument("--legacy", action="store_true", help="a file for each rank")
    return parser.parse_args(arguments)


def main() -> None:
    """Run the command, or those that are read, one a line. All processes are forks of one that has imported all."""
    from importlib import import_module

    for module in ("megatron.core.dist_checkpointing", "megatron.core.models.gpt.gpt_layer_specs", "transformers"):
        import_module(module)

    torch.set_num_threads(1)
    lines = [sys.argv[1:]] if len(sys.argv) > 1 else [line.split() for line in sys.stdin]
    for line in lines:
        options = parsed(line)
        world = lcm(options.tp, (options.etp or options.tp) * options.ep) * options.pp
        with tempfile.TemporaryDirectory() as store:
            mp.start_processes(run, (options, store), nprocs=world, start_method="fork")
        print("---", flush=True)


if __name__ == "__main__":
    sys.exit(main())
