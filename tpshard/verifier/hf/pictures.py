"""Pixels of noise for a model with a tower, and the prompt with places for what the tower makes of them."""

import copy
import inspect
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_FIRST = 4
"""How many tokens of text precede a picture."""
_GRID = (1, 4, 6)
"""Frames, rows and columns of patches: no square, so that what exchanges them shows."""


@dataclass(frozen=True)
class Pictures:
    """What the first step of a run takes beside its tokens.

    arguments: by name, of the model's forward. ids: the prompt [B, S] with the pictures' places. barred: tokens that
    stand for a picture, which must not be decoded.
    """

    arguments: Mapping[str, Tensor]
    ids: Tensor
    barred: tuple[int, ...]

    def of_dtype(self, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """The arguments, floating ones in a dtype."""
        return {
            key: x.to(device).to(dtype) if x.is_floating_point() else x.to(device) for key, x in self.arguments.items()
        }


_PLACEHOLDERS = ("image_token_id", "image_token_index", "media_placeholder_token_id", "img_context_token_id")


def placeholder(config: Any) -> int | None:
    """The token that stands for a picture; some name it beside what makes its features."""
    places = (config, getattr(config, "vision_config", None))
    found = (getattr(each, key, None) for each in places for key in _PLACEHOLDERS)
    return next((token for token in found if isinstance(token, int)), None)


def with_placeholder(config: Any, vocab: int) -> Any:
    """The config, whose token for a picture has a row in the table: which one it is, is of no matter to a run."""
    token = placeholder(config)
    if token is None or token < vocab:
        return config
    config = copy.deepcopy(config)
    for each in (config, getattr(config, "vision_config", None)):
        for key in _PLACEHOLDERS:
            if isinstance(getattr(each, key, None), int):
                setattr(each, key, vocab - 1)
    return config


def special(config: Any, vocab: int) -> tuple[int, ...]:
    """Tokens of a table with `vocab` rows that stand for something else than text."""
    named = (value for key, value in vars(config).items() if "token_id" in key or key.endswith("token_index"))
    text = {"pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "decoder_start_token_id"}
    kept = {getattr(config, key, None) for key in text}
    return tuple(
        sorted({value for value in named if isinstance(value, int) and 0 <= value < vocab and value not in kept})
    )


def pictures_for(model: Any, ids: Tensor, seed: int, vocab: int) -> Pictures | None:
    """A picture for each prompt, tried on the model; None where it takes none of the forms that are known here.

    model: with all its weights. It must give other logits for other pixels.
    """
    token, barred = placeholder(model.config), special(model.config, vocab)
    if token is None:
        return None
    free = next(i for i in range(3, 1 << 30) if i not in barred)
    text = ids.cpu().clone()
    for each in {token, *barred}:
        text[text == each] = free
    for made in _forms(model, len(ids), seed):
        try:
            count = _features(model, made)
            if count is None or count % len(ids):
                continue
            found = _placed(model, made, text, token, barred, count // len(ids))
            pixels = next(iter(made))
            other = Pictures({**found.arguments, pixels: made[pixels].flip(0, -1) * 1.5}, found.ids, barred)
            one, two = (
                model(input_ids=found.ids, **each.of_dtype(model.dtype, model.device)).logits for each in (found, other)
            )
            if bool(one.isfinite().all()) and not torch.equal(one, two):
                return found
        except (
            RuntimeError,
            ValueError,
            TypeError,
            IndexError,
            AttributeError,
            KeyError,
            AssertionError,
            StopIteration,
        ):
            continue
    return None


def _forms(model: Any, batch: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Pixels and, behind them, what goes with them, in each form that some class takes."""
    generator = torch.Generator().manual_seed(seed)
    vision = next((c for key in ("vision_config", "vit_config") if (c := getattr(model.config, key, None))), None)
    if vision is None:
        return
    patch, channels = _one(getattr(vision, "patch_size", 14)), _channels(vision)
    frames = int(_named(vision, "temporal_patch_size", "patch_temporal") or 1)
    takes = set(inspect.signature(model.forward).parameters)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    t, rows, columns = _GRID
    merge = _one(_named(vision, "spatial_merge_size", "merge_kernel_size", "merge_size") or 1)
    rows, columns = (max(1, n // 2) * max(2, merge) for n in (rows, columns))
    if "image_grid_thw" in takes:
        grid = torch.tensor([[t, rows, columns]] * batch)
        patches = batch * t * rows * columns
        yield {"pixel_values": noise(patches, channels * frames * patch * patch), "image_grid_thw": grid}
        yield {"pixel_values": noise(patches, channels, patch, patch), "image_grid_thw": grid}
        yield {"pixel_values": noise(patches, channels, frames, patch, patch), "image_grid_thw": grid}
    if "image_position_ids" in takes:
        pooled = _one(_named(vision, "pooling_kernel_size") or 1)
        across = torch.arange(2 * pooled)
        places = torch.cartesian_prod(across, across).flip(1).expand(batch, -1, -1)
        for side in (patch, patch * pooled):
            yield {
                "pixel_values": noise(batch, places.shape[1], channels * side * side),
                "image_position_ids": places,
            }
    if "image_token_pooling" in takes:
        count = int(vision.num_position_embeddings)
        pooled = next(n for n in (2, 3, 1) if count % n == 0)
        yield {
            "pixel_values": noise(batch, count, channels * patch * patch),
            "image_token_pooling": torch.arange(batch * count).view(-1, pooled),
            "image_grids": torch.tensor([[1, count // pooled, 0, 0]] * batch),
        }
    sizes = getattr(vision, "image_size", None)
    high, wide = (
        (sizes if isinstance(sizes, list | tuple) else (sizes, sizes)) if sizes else (rows * patch, columns * patch)
    )
    if "image_attention_mask" in takes and (crop := getattr(vision, "crop_size", None)):
        side = crop // patch
        yield {
            "image_pixel_values": noise(batch, 2, channels, crop, crop),
            "image_sizes": torch.tensor([[crop, crop]] * batch),
            "image_attention_mask": torch.ones(batch, 2, side, side),
        }
    if "aspect_ratio_ids" in takes:
        tiles, ratios = vision.max_num_tiles, vision.supported_aspect_ratios
        which = next((i for i, (down, across) in enumerate(ratios) if down * across > 1), 0)
        yield {
            "pixel_values": noise(batch, 1, tiles, channels, high, wide),
            "aspect_ratio_ids": torch.full((batch, 1), 1 + which),
            "aspect_ratio_mask": (torch.arange(tiles) < math.prod(ratios[which])).long().expand(batch, 1, tiles),
        }
    sizes = {"image_sizes": torch.tensor([[high, wide]] * batch)}
    for more in ({}, sizes) if "image_sizes" in takes else ({},):
        yield {"pixel_values": noise(batch, channels, high, wide), **more}
        yield {"pixel_values": noise(batch, 1, channels, high, wide), **more}


def _named(config: Any, *keys: str) -> Any:
    """What a config has under the first of these keys; None where it has none."""
    return next((value for key in keys if (value := getattr(config, key, None))), None)


def _one(size: Any) -> int:
    return int(size[0] if isinstance(size, list | tuple) else size)


def _channels(vision: Any) -> int:
    return int(_named(vision, "in_channels", "num_channels", "in_chans") or 3)


def _features(model: Any, made: Mapping[str, Tensor]) -> int | None:
    """How many tokens' places the pictures take: of those that layers attend to, each one."""
    if "image_attention_mask" in made:  # four patches are one feature, and one ends each row, and the first half
        batch, _, side, _ = made["image_attention_mask"].shape
        half = -(-side // 2)
        return int(batch * (2 * half * (half + 1) + 1))
    places = (model, getattr(model, model.base_model_prefix, None))
    owner = next((each for each in places if hasattr(each, "get_image_features")), None)
    if owner is None:
        return len(made["pixel_values"])
    arguments = {key: x.to(model.dtype) if x.is_floating_point() else x for key, x in made.items()}
    found: Any = owner.get_image_features(**arguments)
    given = (getattr(found, key, None) for key in ("pooler_output", "last_hidden_state"))
    found = next((each for each in given if each is not None), found)
    if isinstance(found, Tensor):
        return found.shape[:-1].numel()
    parts = [each for each in found or () if isinstance(each, Tensor)]
    return sum(each.shape[:-1].numel() for each in parts) if parts else None


def _placed(
    model: Any, made: Mapping[str, Tensor], text: Tensor, token: int, barred: tuple[int, ...], count: int
) -> Pictures:
    """The prompt with `count` places in each row, and what says where they are."""
    places = torch.full((len(text), count), token)
    ids = torch.cat((text[:, :_FIRST], places, text[:, _FIRST:]), 1)
    takes = inspect.signature(model.forward).parameters
    which = {key: (ids == token).long() for key in ("mm_token_type_ids", "token_type_ids") if key in takes}
    if "cross_attention_mask" in takes and "aspect_ratio_mask" in made:  # text looks at pictures before it
        seen = (ids == token).cumsum(1)[:, :, None] * made["aspect_ratio_mask"]
        which["cross_attention_mask"] = seen.unsqueeze(2)
    return Pictures({**made, **which}, ids, barred)
