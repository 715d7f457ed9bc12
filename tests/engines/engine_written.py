"""Shapes of small checkpoints of types that are published with code of their own, under published names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Shapes = dict[str, tuple[int, ...]]


def gated(start: str, wide: int, hidden: int) -> Shapes:
    """A feed-forward: gate, up and down."""
    up = {f"{start}{name}_proj.weight": (wide, hidden) for name in ("gate", "up")}
    return up | {f"{start}down_proj.weight": (hidden, wide)}


def ends(config: dict[str, Any]) -> Shapes:
    """The embedding, the last norm, and the head where there is one."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    found = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    return found if config["tie_word_embeddings"] else found | {"lm_head.weight": (vocab, hidden)}


def step3p5(config: dict[str, Any]) -> Shapes:
    """Step 3.5: the experts of a layer are three stacks; layers with a window have heads of another number."""
    hidden, experts, head = config["hidden_size"], config.get("moe_num_experts", 8), config["head_dim"]
    window, found = config["attention_other_setting"], ends(config)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        own = window if config["layer_types"][layer] == window["attention_type"] else config
        heads, kv = own["num_attention_heads"], own["num_attention_groups"]
        rows = {"q_proj": heads * head, "k_proj": kv * head, "v_proj": kv * head, "g_proj": heads}
        found |= {f"{prefix}self_attn.{name}.weight": (each, hidden) for name, each in rows.items()}
        found[f"{prefix}self_attn.o_proj.weight"] = (hidden, heads * head)
        rows |= {"o_proj": hidden}
        if config["attention_bias"]:
            found |= {f"{prefix}self_attn.{name}_proj.bias": (rows[f"{name}_proj"],) for name in "qkvo"}
        found |= {f"{prefix}self_attn.{name}_norm.weight": (head,) for name in "qk"}
        found |= {f"{prefix}{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
        if str(layer) not in config["moe_layers_enum"].split(","):
            dense = gated(f"{prefix}mlp.", config["intermediate_size"], hidden)
            biases = {name.replace("weight", "bias"): shape[:1] for name, shape in dense.items()}
            found |= dense | (biases if config["mlp_bias"] else {})
            continue
        found |= gated(f"{prefix}share_expert.", config["share_expert_dim"], hidden)
        found |= {f"{prefix}moe.gate.weight": (experts, hidden), f"{prefix}moe.router_bias": (experts,)}
        if config["apart"]:
            for expert in range(experts):
                found |= gated(f"{prefix}moe.experts.{expert}.", config["moe_intermediate_size"], hidden)
        else:
            stacks = gated(f"{prefix}moe.", config["moe_intermediate_size"], hidden)
            found |= {name: (experts, *shape) for name, shape in stacks.items()}
    return found


def mimo_v2(config: dict[str, Any]) -> Shapes:
    """MiMo V2.5: query, key and value in as many shares as there are KV heads where no window is."""
    hidden, experts, found = config["hidden_size"], config["n_routed_experts"], ends(config)
    for layer in range(config["num_hidden_layers"]):
        prefix, window = f"model.layers.{layer}.", "swa_" if config["hybrid_layer_pattern"][layer] else ""
        heads, kv = config[f"{window}num_attention_heads"], config[f"{window}num_key_value_heads"]
        head, value = config[f"{window}head_dim"], config[f"{window}v_head_dim"]
        found[f"{prefix}self_attn.qkv_proj.weight"] = ((heads + kv) * head + kv * value, hidden)
        found[f"{prefix}self_attn.o_proj.weight"] = (hidden, heads * value)
        if window:
            found[f"{prefix}self_attn.attention_sink_bias"] = (heads,)
        found |= {f"{prefix}{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
        if not config["moe_layer_freq"][layer]:
            found |= gated(f"{prefix}mlp.", config["intermediate_size"], hidden)
            continue
        gate = f"{prefix}mlp.gate."
        found |= {f"{gate}weight": (experts, hidden), f"{gate}e_score_correction_bias": (experts,)}
        for expert in range(experts):
            found |= gated(f"{prefix}mlp.experts.{expert}.", config["moe_intermediate_size"], hidden)
    return found


def linear(start: str, names: dict[str, tuple[int, int]]) -> Shapes:
    """Matrices with their biases."""
    found = {f"{start}{name}.weight": shape for name, shape in names.items()}
    return found | {f"{start}{name}.bias": shape[:1] for name, shape in names.items()}


def norms(start: str, hidden: int, *names: str) -> Shapes:
    """Norms with their biases."""
    return {f"{start}{name}.{leaf}": (hidden,) for name in names for leaf in ("weight", "bias")}


def ernie4_5_moe_vl(config: dict[str, Any]) -> Shapes:
    """ERNIE 4.5 VL: the text's experts, behind them the picture's, which are narrower; gates the other way round."""
    hidden, head, found = config["hidden_size"], config["head_dim"], ends(config)
    rows = {"q": config["num_attention_heads"] * head, "k": config["num_key_value_heads"] * head}
    rows["v"] = rows["k"]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        found |= {f"{prefix}self_attn.{name}_proj.weight": (each, hidden) for name, each in rows.items()}
        found[f"{prefix}self_attn.o_proj.weight"] = (hidden, rows["q"])
        found |= {f"{prefix}{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
        if layer < config["moe_layer_start_index"][0]:
            found |= gated(f"{prefix}mlp.", config["intermediate_size"], hidden)
            continue
        text, picture = config["moe_num_experts"]
        widths = config["moe_intermediate_size"]
        for expert in range(text + picture):
            found |= gated(f"{prefix}mlp.experts.{expert}.", widths[expert >= text], hidden)
        found |= gated(f"{prefix}mlp.shared_experts.", widths[0] * config["moe_num_shared_experts"], hidden)
        found |= {f"{prefix}mlp.gate.weight": (hidden, text), f"{prefix}mlp.gate.weight_1": (hidden, picture)}
        found[f"{prefix}mlp.moe_statics.e_score_correction_bias"] = (2, text)
    vision, size = config["vision_config"], config["pixel_hidden_size"] * config["spatial_conv_size"] ** 2
    wide, start = vision["hidden_size"], "vision_model."
    found |= {f"{start}patch_embed.proj.weight": (wide, 3 * vision["patch_size"] ** 2)} | norms(start, wide, "ln")
    for layer in range(vision["depth"]):
        start = f"vision_model.blocks.{layer}."
        ffn = vision["mlp_ratio"] * wide
        found |= linear(start, {"attn.qkv": (3 * wide, wide), "attn.proj": (wide, wide)})
        found |= linear(start, {"mlp.fc1": (ffn, wide), "mlp.fc2": (wide, ffn)}) | norms(start, wide, "norm1", "norm2")
    start, time = "model.resampler_model.", config["temporal_conv_size"]
    for part, features in (("spatial", size), ("temporal", time * size)):
        found |= linear(start, {f"{part}_linear.0": (size, features), f"{part}_linear.2": (size, size)})
        found |= norms(start, size, f"{part}_linear.3")
    return found | linear(start, {"mlp": (hidden, size)}) | {f"{start}after_norm.weight": (hidden,)}


def molmo2(config: dict[str, Any]) -> Shapes:
    """Molmo 2: tokens that are only read have an embedding of their own."""
    text, vit, adapter = (config[f"{name}_config"] for name in ("text", "vit", "adapter"))
    hidden, head = text["hidden_size"], text["head_dim"]
    heads, kv = text["num_attention_heads"] * head, text["num_key_value_heads"] * head
    start = "model.transformer."
    found: Shapes = {
        "lm_head.weight": (text["vocab_size"], hidden),
        f"{start}wte.embedding": (text["vocab_size"], hidden),
        f"{start}wte.new_embedding": (text["additional_vocab_size"], hidden),
        f"{start}ln_f.weight": (hidden,),
    }
    for layer in range(text["num_hidden_layers"]):
        prefix = f"{start}blocks.{layer}."
        found |= {f"{prefix}{name}_norm.weight": (hidden,) for name in ("attn", "ff")}
        found[f"{prefix}self_attn.att_proj.weight"] = (heads + 2 * kv, hidden)
        if text["qkv_bias"]:
            found[f"{prefix}self_attn.att_proj.bias"] = (heads + 2 * kv,)
        if text["use_qk_norm"]:
            whole = text["qk_norm_type"] == "olmo"
            found[f"{prefix}self_attn.q_norm.weight"] = (heads if whole else head,)
            found[f"{prefix}self_attn.k_norm.weight"] = (kv if whole else head,)
        found[f"{prefix}self_attn.attn_out.weight"] = (hidden, heads)
        found[f"{prefix}mlp.ff_proj.weight"] = (2 * text["intermediate_size"], hidden)
        found[f"{prefix}mlp.ff_out.weight"] = (hidden, text["intermediate_size"])
    wide, start = vit["hidden_size"], "model.vision_backbone."
    found[f"{start}image_vit.positional_embedding"] = (vit["image_num_pos"], wide)
    found |= linear(start, {"image_vit.patch_embedding": (wide, 3 * vit["image_patch_size"] ** 2)})
    for layer in range(vit["num_hidden_layers"]):
        prefix, ffn = f"{start}image_vit.transformer.resblocks.{layer}.", vit["intermediate_size"]
        found |= linear(f"{prefix}attention.", {f"w{name}": (wide, wide) for name in "qkvo"})
        found |= linear(f"{prefix}feed_forward.", {"w1": (ffn, wide), "w2": (wide, ffn)})
        found |= norms(prefix, wide, "attention_norm", "ffn_norm")
    pooled, own, ffn = wide * len(adapter["vit_layers"]), adapter["hidden_size"], adapter["intermediate_size"]
    found |= linear(f"{start}image_pooling_2d.", {**{f"w{name}": (own, pooled) for name in "qkv"}, "wo": (own, own)})
    projector = {"w1": (ffn, own), "w3": (ffn, own), "w2": (adapter["text_hidden_size"], ffn)}
    return found | {f"{start}image_projector.{name}.weight": shape for name, shape in projector.items()}


def step3p7(config: dict[str, Any]) -> Shapes:
    """Step 3.7: a text of Step 3.5's, and a tower with q, k and v stored as one."""
    vision, found = config["vision_config"], step3p5(config["text_config"])
    wide, side = vision["width"], vision["image_size"] // vision["patch_size"]
    found["vision_model.conv1.weight"] = (wide, 3, vision["patch_size"], vision["patch_size"])
    found["vision_model.positional_embedding"] = (side**2, wide)
    found |= norms("vision_model.", wide, "ln_pre")
    for layer in range(vision["layers"]):
        start, ffn = f"vision_model.transformer.resblocks.{layer}.", int(vision["mlp_ratio"] * wide)
        found |= {f"{start}attn.in_proj_weight": (3 * wide, wide), f"{start}attn.in_proj_bias": (3 * wide,)}
        found |= linear(start, {"attn.out_proj": (wide, wide), "mlp.c_fc": (ffn, wide), "mlp.c_proj": (wide, ffn)})
        found |= norms(start, wide, "ln_1", "ln_2") | {f"{start}ls_{each}.gamma": (wide,) for each in "12"}
    for number in (1, 2):
        before = wide * 2 ** (number - 1)
        found[f"vision_model.vit_downsampler{number}.weight"] = (2 * before, before, 3, 3)
        found[f"vision_model.vit_downsampler{number}.bias"] = (2 * before,)
    return found | {"vit_large_projector.weight": (config["text_config"]["hidden_size"], 4 * wide)}


def phi4mm(config: dict[str, Any]) -> Shapes:
    """Phi 4 multimodal: each matrix of the text with two adapters; a tower of which the last layer is not taken."""
    hidden, ffn, found = config["hidden_size"], config["intermediate_size"], ends(config)
    head = hidden // config["num_attention_heads"]
    qkv = hidden + 2 * head * config["num_key_value_heads"]
    modules = {"self_attn.qkv_proj": (qkv, hidden), "self_attn.o_proj": (hidden, hidden)}
    modules |= {"mlp.gate_up_proj": (2 * ffn, hidden), "mlp.down_proj": (hidden, ffn)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        found |= {f"{prefix}{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
        for module, (rows, columns) in modules.items():
            found[f"{prefix}{module}.base_layer.weight"] = (rows, columns)
            for adapter in ("speech", "vision"):
                found[f"{prefix}{module}.lora_A.{adapter}.weight"] = (4, columns)
                found[f"{prefix}{module}.lora_B.{adapter}.weight"] = (rows, 4)
    start, wide = "model.embed_tokens_extend.image_embed.", 1152  # vLLM's class has no other
    found |= {f"{start}glb_GN": (1, 1, wide), f"{start}sub_GN": (1, 1, 1, wide)}
    found |= linear(start, {"img_projection.0": (hidden, wide), "img_projection.2": (hidden, hidden)})
    start += "img_processor."
    found[f"{start}embeddings.patch_embedding.weight"] = (wide, 3, 14, 14)
    found[f"{start}embeddings.patch_embedding.bias"] = (wide,)
    found[f"{start}embeddings.position_embedding.weight"] = (1024, wide)
    found |= {f"{start}head.probe": (1, 1, wide)} | norms(start, wide, "post_layernorm")
    for layer in range(3):
        prefix = f"{start}encoder.layers.{layer}."
        found |= linear(
            f"{prefix}self_attn.", {name: (wide, wide) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
        )
        found |= linear(f"{prefix}mlp.", {"fc1": (4304, wide), "fc2": (wide, 4304)})
        found |= norms(prefix, wide, "layer_norm1", "layer_norm2")
    return found | _conformer("model.embed_tokens_extend.audio_embed.", config["audio_processor"]["config"], hidden)


def _conformer(start: str, config: dict[str, Any], hidden: int) -> Shapes:
    wide, ffn, convolved = (
        config["attention_dim"],
        config["linear_units"],
        config["nemo_conv_settings"]["conv_channels"],
    )
    encoder = f"{start}encoder."
    found = linear(encoder, {"embed.out": (wide, wide)})
    for place, shape in ((0, (3, 3)), (2, (3, 3)), (3, (1, 1)), (5, (3, 3)), (6, (1, 1))):
        conv = f"{encoder}embed.conv.{place}."
        found |= {
            f"{conv}weight": (convolved, convolved if shape == (1, 1) else 1, *shape),
            f"{conv}bias": (convolved,),
        }
    found[f"{encoder}relative_attention_bias_layer.bias_values.weight"] = (1000, config["attention_heads"])
    found |= {f"{encoder}encoder_embedding.global_{name}": (config["input_size"],) for name in ("mean", "invstd")}
    for layer in range(config["num_blocks"]):
        prefix = f"{encoder}encoders.{layer}."
        for half in ("feed_forward_in", "feed_forward_out"):
            found |= norms(f"{prefix}{half}.", wide, "layer_norm")
            found |= linear(f"{prefix}{half}.net.", {"0.linear": (2 * ffn, wide), "2": (wide, ffn)})
        found |= linear(f"{prefix}self_attn.linear_", {name: (wide, wide) for name in ("q", "k", "v", "out")})
        found |= norms(prefix, wide, "conv.layer_norm", "layer_norm_att", "layer_norm")
        found |= {f"{prefix}conv.glu.b{each}": (1, wide, 1) for each in "12"}
        shapes = {"glu.ext_pw_conv_1d": (2 * wide, wide, 1), "ext_pw_conv_1d": (wide, wide, 1)}
        shapes |= {"dw_sep_conv_1d.dw_conv": (wide, 1, 3), "dw_sep_conv_1d.pw_conv": (wide, wide, 1)}
        found |= {f"{prefix}conv.{name}.weight": shape for name, shape in shapes.items()}
        found |= {f"{prefix}conv.{name}.bias": shape[:1] for name, shape in shapes.items()}
    for kind in ("speech", "vision"):
        found |= linear(f"{start}audio_projection.{kind}.", {"0": (hidden, wide), "2": (hidden, hidden)})
    return found


WRITTEN: dict[str, tuple[str, Callable[[dict[str, Any]], Shapes]]] = {
    "step3p5": ("Step3p5ForCausalLM", step3p5),
    "mimo_v2": ("MiMoV2ForCausalLM", mimo_v2),
    "ernie4_5_moe_vl": ("Ernie4_5_VLMoeForConditionalGeneration", ernie4_5_moe_vl),
    "molmo2": ("Molmo2ForConditionalGeneration", molmo2),
    "step3p7": ("Step3p7ForConditionalGeneration", step3p7),
    "phi4mm": ("Phi4MMForCausalLM", phi4mm),
}
"""By model_type, the class that the config names, and the tensors' shapes."""
