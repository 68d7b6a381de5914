"""Configuration: frozen dataclasses, one per section; `presets` names some, `toml` reads and writes them.

No torch in here. What leaves this module is consistent: an impossible value ends in a `UsageError` that names
the option, the value found and what would do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from maesil.config.checks import is_text, require
from maesil.errors import UsageError
from maesil.sizes import parse_size
from maesil.types import MAP_CELL, Edges, Window, Zyx, edges_told, one_if_cube, zyx

HEAD_WIDTH = 64
"""Channels of one attention head: what flash attention likes, and half the cost of 32 in the decoder."""

PRIMUS_HEAD_WIDTHS = (66, 72)
"""Those of Primus S, B, L, and of M; a third of a head's channels turns with each axis, in pairs."""

ModelKind = Literal["maesil", "ae", "vae", "vqvae", "mae2d", "primus"]
MODEL_KINDS: tuple[ModelKind, ...] = get_args(ModelKind)
MASKED_AUTOENCODERS: tuple[ModelKind, ...] = ("maesil", "primus")
"""The models that share masks, decoders and heads, and differ in their encoder alone."""
AUTOENCODERS: tuple[ModelKind, ...] = ("ae", "vae", "vqvae")
PAPER_KINDS: tuple[ModelKind, ...] = ("maesil", *AUTOENCODERS, "mae2d")
"""The models that the paper compares."""
DecoderKind = Literal["full", "subset", "cross"]
DECODERS: tuple[DecoderKind, ...] = get_args(DecoderKind)
HeadKind = Literal["linear", "overlap", "interpolate", "refine"]
HEADS: tuple[HeadKind, ...] = get_args(HeadKind)
MaskKind = Literal["dual", "random", "tube", "slab", "none"]
MASK_KINDS: tuple[MaskKind, ...] = get_args(MaskKind)
PictureHeadKind = Literal["refine", "none"]
PICTURE_HEADS: tuple[PictureHeadKind, ...] = get_args(PictureHeadKind)
OptimizerName = Literal["muon", "adamw"]
OPTIMIZERS: tuple[OptimizerName, ...] = get_args(OptimizerName)
TrackerName = Literal["tensorboard", "wandb", "mlflow"]
TRACKERS: tuple[TrackerName, ...] = get_args(TrackerName)
Offsets = Literal["across", "inside"]
OFFSETS: tuple[Offsets, ...] = get_args(Offsets)
Thin = Literal["skip", "pad", "refuse"]
THIN: tuple[Thin, ...] = get_args(Thin)
Kernels = Literal["auto", "reference", "triton"]
KERNELS: tuple[Kernels, ...] = get_args(Kernels)


def hidden_count(share: float, of: int) -> int:
    """Return how many of ``of`` positions a hidden share means: rounded, halves up."""
    return math.floor(share * of + 0.5)


def _heads(width: int) -> int:
    return max(1, width // HEAD_WIDTH)


@dataclass(frozen=True)
class ModelConfig:
    """The model: input edge and patch edge in voxels, widths in channels, depths in blocks."""

    kind: ModelKind = "maesil"
    """``maesil``, the masked autoencoder; ``primus``, the same with the encoder of Primus, which nnU-Net can go on
    from; or a baseline: ``mae2d`` (slice by slice), ``ae``, ``vae``, ``vqvae``."""
    crop: Edges = 64
    """The box that the model sees: the edge of a cube (voxels), or three edges z, y, x; at most the store's
    superpatch."""
    patch: Edges = 8
    """One patch, one token: the edge of a cube (voxels), or three edges z, y, x; each a multiple of 8, or 1, 2 or 4, so
    that it lies on the maps."""
    width: int = 128
    """Channels of a token. ``primus``: a multiple of 66 or 72; Primus S, B, M, L have 396, 792, 864, 1056."""
    depth: int = 4
    registers: int = 0
    """Tokens of no place that the encoder has beside those of patches (``primus`` only)."""
    decoder_width: int = 128
    decoder_depth: int = 1
    decoder: DecoderKind = "full"
    """Which tokens the decoder sees: ``full``, all; ``subset``, the visible ones and a share of the hidden ones;
    ``cross``, a share of the hidden ones, which only look at the visible ones (``maesil``, ``primus``)."""
    decoded: float = 0.25
    """Share of the hidden tokens that one training step of ``subset`` and ``cross`` decodes and scores."""
    head: HeadKind = "linear"
    """From tokens to voxels while learning: ``linear``, ``overlap``, ``interpolate`` or ``refine``, see
    `maesil.models.heads`; with ``refine`` the encoder learns nothing (``maesil``, ``primus``)."""
    picture_head: PictureHeadKind = "refine"
    """The part that turns the tokens' draft into pictures: ``refine``, trained beside the model without touching it; or
    ``none`` (``maesil``, ``primus``)."""
    decorrelation: float = 0.05
    """Weight of the loss that keeps the channels of the latent apart, so that tokens fill many directions (``maesil``,
    ``primus``; ours)."""
    channels: int = 16
    """Of the first stage of ``ae``, ``vae`` and ``vqvae``; doubled with every halving of the edge."""
    latent: int = 128
    """Channels of their code, one code per patch."""
    codes: int = 512
    """Codebook entries of ``vqvae``."""
    penalty: float = 0.001
    """Weight of the auxiliary loss: Kullback-Leibler divergence of ``vae`` (warmed up), commitment of ``vqvae``."""

    def __post_init__(self) -> None:
        for name, known in (
            ("kind", MODEL_KINDS),
            ("decoder", DECODERS),
            ("head", HEADS),
            ("picture_head", PICTURE_HEADS),
        ):
            require(getattr(self, name) in known, f"model.{name}", getattr(self, name), f"one of {', '.join(known)}")
        self._require_edges()
        self._require_widths()
        for name in ("depth", "decoder_depth", "channels", "latent"):
            require(getattr(self, name) >= 1, f"model.{name}", getattr(self, name), "at least 1")
        require(self.codes >= 2, "model.codes", self.codes, "at least 2")
        for name in ("penalty", "decorrelation"):
            require(getattr(self, name) >= 0, f"model.{name}", getattr(self, name), "at least 0")
        require(0 < self.decoded <= 1, "model.decoded", self.decoded, "above 0 and at most 1")
        on_all = self.decoder == "full" or self.head != "interpolate"
        require(on_all, "model.head", self.head, f"linear, overlap or refine with model.decoder={self.decoder}")
        smooth = self.head != "interpolate" or all(one >= 4 and one.bit_count() == 1 for one in self.patch_zyx)
        patch = edges_told(self.patch)
        require(smooth, "model.patch", patch, f"a power of 2, at least 4, with model.head={self.head}")
        halved = self.kind not in AUTOENCODERS or (
            max(self.patch_zyx) >= 2 and all(one.bit_count() == 1 for one in self.patch_zyx)
        )
        require(halved, "model.patch", patch, f"a power of 2, at least 2, with model.kind={self.kind}")

    def _require_widths(self) -> None:
        """Check that heads are whole, and that only Primus is asked for what only Primus has."""
        of_primus = self.kind == "primus"
        for name, width in (("width", self.width), ("decoder_width", self.decoder_width)):
            if of_primus and name == "width":
                continue
            whole_heads = width >= 8 and (width < HEAD_WIDTH or width % HEAD_WIDTH == 0)
            expected = f"a multiple of {HEAD_WIDTH}, or 8 to {HEAD_WIDTH - 1}"
            require(whole_heads, f"model.{name}", width, expected)
        if of_primus:
            least = min(PRIMUS_HEAD_WIDTHS)
            small = 0 < self.width < least and self.width % 6 == 0
            whole_heads = small or any(self.width % edge == 0 for edge in PRIMUS_HEAD_WIDTHS)
            told = " or ".join(map(str, PRIMUS_HEAD_WIDTHS))
            expected = f"a multiple of {told}, or one of 6 below {least}, with model.kind=primus"
            require(whole_heads and self.width > 0, "model.width", self.width, expected)
        require(self.registers >= 0, "model.registers", self.registers, "at least 0")
        require(of_primus or not self.registers, "model.registers", self.registers, f"0 with model.kind={self.kind}")

    def _require_edges(self) -> None:
        """Check crop and patch axis by axis, and write a cube as one number, however it was given."""
        for name in ("crop", "patch"):
            found = getattr(self, name)
            of_box = isinstance(found, int) or (len(found) == 3 and all(isinstance(one, int) for one in found))
            require(of_box, f"model.{name}", found, "one edge in voxels, or three (z, y, x)")
            object.__setattr__(self, name, one_if_cube(found))
        crop, patch = edges_told(self.crop), edges_told(self.patch)
        for of_crop, of_patch in zip(self.crop_zyx, self.patch_zyx, strict=True):
            on_maps = of_patch > 0 and (MAP_CELL % of_patch == 0 or of_patch % MAP_CELL == 0)
            require(on_maps, "model.patch", patch, f"a multiple or a divisor of {MAP_CELL}")
            edge = math.lcm(of_patch, MAP_CELL)
            fits = of_crop >= 2 * of_patch and of_crop % edge == 0
            along = "" if crop.isdigit() and patch.isdigit() else f" where the patch has {of_patch}"
            require(fits, "model.crop", crop, f"a multiple of {edge}, at least two patches of {of_patch}{along}")

    @property
    def heads(self) -> int:
        """Attention heads of the encoder."""
        if self.kind == "primus":
            return next((self.width // one for one in PRIMUS_HEAD_WIDTHS if self.width % one == 0), 1)
        return _heads(self.width)

    @property
    def decoder_heads(self) -> int:
        """Attention heads of the decoder."""
        return _heads(self.decoder_width)

    @property
    def crop_zyx(self) -> Zyx:
        """Edges of the crop (voxels)."""
        return zyx(self.crop)

    @property
    def patch_zyx(self) -> Zyx:
        """Edges of a patch (voxels)."""
        return zyx(self.patch)

    @property
    def patch_voxels(self) -> int:
        """Voxels of a patch."""
        return math.prod(self.patch_zyx)

    @property
    def grid(self) -> Zyx:
        """Tokens along z, y, x."""
        z, y, x = (of_crop // of_patch for of_crop, of_patch in zip(self.crop_zyx, self.patch_zyx, strict=True))
        return z, y, x

    @property
    def tokens(self) -> int:
        """Tokens of one crop, visible and hidden."""
        return math.prod(self.grid)


@dataclass(frozen=True)
class MaskConfig:
    """Which tokens are hidden. Ratios are hidden shares."""

    kind: MaskKind = "dual"
    """``dual``, ``random``, ``tube``, ``slab``, or ``none`` (nothing is hidden, all is scored)."""
    plane: float = 0.5
    """Share of the (y, x) positions hidden in all z layers alike (``dual``, ``tube``, ``slab``; ours)."""
    axis: float = 0.5
    """``dual``: the share of the remaining positions that each z layer hides on its own (ours). ``slab``: the share of
    z layers hidden whole."""
    share: float = 0.75
    """Share of all tokens hidden by ``random``."""

    def __post_init__(self) -> None:
        require(self.kind in MASK_KINDS, "mask.kind", self.kind, f"one of {', '.join(MASK_KINDS)}")
        for name in ("plane", "axis", "share"):
            require(0 < getattr(self, name) < 1, f"mask.{name}", getattr(self, name), "between 0 and 1")

    def parts(self, grid: Zyx) -> dict[str, tuple[int, int]]:
        """Return, for each ratio that this kind uses, how many positions it hides of how many."""
        gz, gy, gx = grid
        columns = hidden_count(self.plane, gy * gx)
        left = gy * gx - columns
        return {
            "dual": {"plane": (columns, gy * gx), "axis": (hidden_count(self.axis, left), left)},
            "tube": {"plane": (columns, gy * gx)},
            "slab": {"plane": (columns, gy * gx), "axis": (hidden_count(self.axis, gz), gz)},
            "random": {"share": (hidden_count(self.share, gz * gy * gx), gz * gy * gx)},
            "none": {},
        }[self.kind]


@dataclass(frozen=True)
class TrainConfig:
    """How to train. Everything that changes the loss is a function of these values, the model and the stores alone."""

    seed: int = 0
    steps: int = 1000
    batch: int = 8
    """Crops per step, over all ranks."""
    accumulate: int = 1
    """Micro-batches of a step, on each rank, one after the other: the same step in less memory. Only
    ``model.decorrelation`` differs: it looks at each micro-batch by itself."""
    optimizer: OptimizerName = "muon"
    """``muon`` for the matrices of the transformer's blocks and AdamW for the rest; or ``adamw`` for all (ours)."""
    lr: float = 6e-3
    """Highest learning rate, reached after the warm-up and then lowered to 0 along a cosine."""
    picture_head_every: int = 4
    """The picture head is trained on every so many-th crop of a step."""
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    warmup: float = 0.1
    """Share of the steps in which the learning rate rises from 0."""
    clip: float = 1.0
    """Largest gradient norm; longer gradients are scaled down to it."""
    window: Window = (-1000.0, 1000.0)
    """Intensity window (HU), see `maesil.types.Intensity`."""
    min_body: float = 0.1
    """Least body share of a crop that is trained on (0..1)."""
    thin: Thin = "skip"
    """A patient to train on who gives no crop, since the scans are thinner than a crop or hold too little body:
    ``skip``, left out, and said; ``pad``, the body share of a thin scan counts within the scan alone, so that crops
    reach beyond it; ``refuse``, an error."""
    offsets: Offsets = "across"
    """Where crops lie, in whole 8^3 cells: ``across``, anywhere in a volume, superpatches read 2x2x2 at a time (ours);
    ``inside``, each within one superpatch: the paper's grid where crops are as large as superpatches."""
    crops_per_visit: int = 8
    """Crops that are cut, in as many steps, from superpatches that ``across`` reads together. With fewer, more is read,
    and crops mix better."""
    flips: str = "x"
    """Axes along which crops are mirrored at random, some of the letters z, y, x (ours)."""
    window_jitter: float = 0.0
    """Each end of the window is moved at random, crop by crop, by up to this share of the window's width (ours)."""
    ema: float = 0.99
    """Decay of the moving average of the weights that validation, evaluation and export use; 0 keeps none."""
    minutes: float = 0.0
    """If given, ``steps`` is set at the start to what fits into so many minutes on this machine, waiting for data
    included, and then stays."""
    compile: bool = False
    """Compile the training step with ``torch.compile``: minutes at the start, faster steps on a GPU."""
    activation_checkpointing: bool = False
    """Keep the inputs of transformer and residual blocks alone, and compute the rest anew on the way back: less memory,
    about a third more work. Losses stay."""
    where: str = ""
    """Filter on the superpatches that are trained and validated on, such as ``body > 0.3 and spacing_z <= 2``."""
    validation: float = 0.2
    """Share of the patients held out (at least one, if there are two or more); 0 holds out none."""
    validation_crops: int = 64
    """Most crops that one validation looks at, spread evenly over the held-out volumes."""
    log_every: int = 1
    """Steps between lines in ``metrics.jsonl``."""
    validate_every: int = 200
    checkpoint_every: int = 200
    checkpoint_minutes: float = 0.0
    """Minutes after which a checkpoint is written, beside those by steps; 0: by steps alone."""
    keep_best: bool = False
    """Keep the weights of the best held-out score, too, in ``RUN/best``."""
    picture_every: int = 0
    """Steps between reconstruction pictures; 0 draws one at the end only."""
    tracker: TrackerName = "tensorboard"
    """Where the metrics go beside ``metrics.jsonl``: ``tensorboard``, files in ``RUN/tensorboard``; ``wandb``, W&B;
    ``mlflow``, MLflow. The last two are extras of the same name."""
    ram: str = ""
    """Memory for superpatches that were read once, shared by the ranks of a machine: a size with its unit, such as
    ``8GB``; ``auto``: half of what is free. Losses stay."""
    stage: str = ""
    """Folder on this machine where superpatches stay once they were fetched, for all runs and ranks; empty: none."""
    stage_size: str = "200GB"
    """Space that the stage may take; superpatches not used for the longest time go first."""
    device_resident: bool = False
    """Keep the training scans themselves on the device and cut crops there. Losses stay."""
    readers: int = 2
    """Threads that read superpatches ahead of the step; at least 16 where a store lies in object storage."""
    threads: int = 0
    """CPU threads for the model; 0 leaves it to torch. Losses are equal to the bit for equally many threads."""
    device: str = "auto"
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N``."""
    kernels: Kernels = "auto"
    """``auto``: Triton on a GPU, else plain PyTorch; ``reference``: plain PyTorch; ``triton``: Triton or an error."""

    def __post_init__(self) -> None:
        for name in (
            "steps", "batch", "accumulate", "crops_per_visit", "validation_crops", "log_every", "validate_every",
            "checkpoint_every", "picture_head_every",
            "readers",
        ):  # fmt: skip
            require(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "at least 1")
        require(self.batch % self.accumulate == 0, "train.accumulate", self.accumulate, f"a divisor of {self.batch}")
        for name in ("seed", "picture_every", "threads", "weight_decay", "minutes", "checkpoint_minutes"):
            require(getattr(self, name) >= 0, f"train.{name}", getattr(self, name), "at least 0")
        for name in ("lr", "clip"):
            require(getattr(self, name) > 0, f"train.{name}", getattr(self, name), "greater than 0")
        require(self.optimizer in OPTIMIZERS, "train.optimizer", self.optimizer, f"one of {', '.join(OPTIMIZERS)}")
        for name in ("warmup", "validation", "min_body", "ema"):
            require(0 <= getattr(self, name) < 1, f"train.{name}", getattr(self, name), "at least 0 and below 1")
        require(0 <= self.window_jitter < 0.5, "train.window_jitter", self.window_jitter, "at least 0 and below 0.5")
        require(all(0 <= beta < 1 for beta in self.betas), "train.betas", self.betas, "two numbers in [0, 1)")
        require(self.window[0] < self.window[1], "train.window", self.window, "a lower and an upper end in HU")
        require(set(self.flips) <= set("zyx"), "train.flips", self.flips, "some of the letters z, y, x")
        require(self.offsets in OFFSETS, "train.offsets", self.offsets, f"one of {', '.join(OFFSETS)}")
        require(self.tracker in TRACKERS, "train.tracker", self.tracker, f"one of {', '.join(TRACKERS)}")
        require(self.thin in THIN, "train.thin", self.thin, f"one of {', '.join(THIN)}")
        if self.ram not in ("", "auto"):
            parse_size(self.ram, "train.ram", "auto or ")
        require(parse_size(self.stage_size, "train.stage_size") > 0, "train.stage_size", self.stage_size, "more than 0")
        require(is_text(self.stage), "train.stage", ascii(self.stage), "a folder's name in UTF-8")
        known = self.device in ("auto", "cpu", "cuda") or self.device.removeprefix("cuda:").isdigit()
        require(known, "train.device", self.device, "auto, cpu, cuda or cuda:N")
        require(is_text(self.where), "train.where", ascii(self.where), "a filter in UTF-8")
        require(self.kernels in KERNELS, "train.kernels", self.kernels, f"one of {', '.join(KERNELS)}")


@dataclass(frozen=True)
class RunConfig:
    """Everything a run is made from, apart from its stores; written to ``RUN/config.toml``."""

    model: ModelConfig = field(default_factory=ModelConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        for name, (hidden, of) in self.mask.parts(self.model.grid).items():
            found = getattr(self.mask, name)
            require(0 < hidden < of, f"mask.{name}", found, f"a share that hides some, not all, of {of} positions")
        by_layer = self.model.kind != "mae2d" or self.mask.kind in ("dual", "tube", "none")
        require(by_layer, "mask.kind", self.mask.kind, "dual, tube or none with model.kind=mae2d (layers hide alike)")
        at_once = self.model.kind != "vqvae" or self.train.accumulate == 1
        require(at_once, "train.accumulate", self.train.accumulate, "1 with model.kind=vqvae (its codebook follows "
                 "whole steps); more ranks need less memory too")  # fmt: skip


AS_BEFORE = RunConfig(
    ModelConfig(head="refine", picture_head="none", decorrelation=0.0), train=TrainConfig(optimizer="adamw", lr=5e-3)
)
"""What older runs and encoders meant by options that did not exist yet: their files are read over these."""


def require_tile(config: ModelConfig, tile: int, store: object) -> None:
    """Raise UsageError unless crops of ``config`` are no larger than the store's superpatches of edge ``tile``."""
    if max(config.crop_zyx) > tile:
        step = math.lcm(*config.patch_zyx, MAP_CELL)
        fitting = [str(edge) for edge in range(tile // step * step, 0, -step) if tile % edge == 0]
        raise UsageError(
            f"{store}: its superpatches have an edge of {tile} voxels, less than model.crop={edges_told(config.crop)}; "
            f"set model.crop to {' or '.join(fitting[:3]) or '(none)'}, or ingest with another --superpatch"
        )
