"""Opening a checkpoint of any kind: where its weights lie, what model it is, and a reader of its tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qwen2_jax.checkpoint import files, hf_config, names
from qwen2_jax.checkpoint.digests import has_record
from qwen2_jax.checkpoint.hf import HfReader
from qwen2_jax.checkpoint.hub import local_path
from qwen2_jax.checkpoint.names import Slot
from qwen2_jax.checkpoint.pieces import Reader
from qwen2_jax.checkpoint.step_folders import check_whole, newest_step
from qwen2_jax.config import ModelConfig
from qwen2_jax.errors import UserError
from qwen2_jax.shapes import param_shapes

PARAMS = "params"


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint whose tensors are those of its configuration, in name and shape.

    `folder` holds config.json and the tokenizer's files; `slots` are places in the stacked tree; `step` is the folder
    of a training step whose files have digests.
    """

    folder: Path
    cfg: ModelConfig
    slots: list[Slot]
    reader: Reader
    step: Path | None = None

    def refuse_damage(self, *, share: tuple[int, int] = (0, 1)) -> None:
        """Reads a training step's parameters and raises DamagedCheckpoint when they are not what was written; of n
        processes, number i reads the share (i, n). Other checkpoints have no digests."""
        if self.step is not None:
            check_whole(self.step, (PARAMS,), share=share)


def open_checkpoint(src: str | Path, *, revision: str | None = None, ignore: Sequence[str] = ()) -> Checkpoint:
    """Opens a Hugging Face folder, a `.safetensors` file, an Orbax checkpoint, or a hub repository.

    Of a training run's folder the last step is taken. `ignore` names fields of config.json to pass over. Reads headers
    and metadata, no weights (but a tied head that is stored anyway is compared with the embedding). Raises UserError,
    naming file and tensor, for whatever is missing, unexpected, misshapen, of another dtype, or damaged.
    """
    path = local_path(src, revision=revision)
    tree = _tree_folder(path)
    if tree is None:
        folder = _config_folder(path if path.is_dir() else path.parent, up=0)
        cfg = hf_config.read_config(folder, ignore=ignore)
        slots = names.slots(cfg)
        weights = HfReader(path)
        weights.check(slots, tied=cfg.tied_head, lm=cfg.head == "lm")
        return Checkpoint(folder, cfg, slots, weights)

    from qwen2_jax.checkpoint.stream import TreeReader  # Orbax takes seconds to import

    folder = _config_folder(tree.parent, up=1)
    files.check_mark(folder)
    cfg = hf_config.read_config(folder, ignore=ignore)
    reader = TreeReader(tree)
    reader.check(param_shapes(cfg))
    return Checkpoint(folder, cfg, names.slots(cfg), reader, tree.parent if has_record(tree.parent) else None)


def _tree_folder(path: Path) -> Path | None:
    """The folder of the Orbax parameter tree, or None when `path` is not an Orbax checkpoint."""
    if not path.is_dir():
        if path.suffix != ".safetensors":
            raise UserError(f"{path} is not a .safetensors file: give one, or a folder, or an Orbax checkpoint")
        return None
    if (path / "_METADATA").exists():
        return path
    if (path / PARAMS).is_dir():
        return path / PARAMS
    step = newest_step(path)
    return None if step is None else path / str(step) / PARAMS


def _config_folder(folder: Path, *, up: int) -> Path:
    """The folder that holds config.json: this one, or one of `up` above it."""
    tried = [folder, *folder.absolute().parents[:up]]
    for candidate in tried:
        if (candidate / files.CONFIG).exists():
            return candidate
    raise UserError(f"{folder} has no {files.CONFIG}, which says what model the weights are")
