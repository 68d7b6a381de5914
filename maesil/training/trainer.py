"""A run in memory: from batches to steps, one validation, one picture, one checkpoint."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from maesil.config.schema import MASKED_AUTOENCODERS
from maesil.data.crops import Crop, whole_patches
from maesil.data.loader import Batch, CropLoader, PlacesInScans
from maesil.data.resident import ResidentLoader, open_loader
from maesil.data.sampler import CropSampler, Draw
from maesil.data.split import Split
from maesil.devices import sent
from maesil.errors import UsageError
from maesil.models.latent import LatentStatistics, mean_over_crop, shuffled
from maesil.models.masked_input import CropsInScans, MaskedInput
from maesil.models.masking import draw_noise, draw_targets, make_masks
from maesil.models.patches import expand_cells, to_hu, unpatchify
from maesil.training.checkpoint import save_checkpoint
from maesil.training.learner import Learner, MicroBatch
from maesil.types import HuArray, Intensity, Window

AnyBatch = Batch[Tensor] | Batch[PlacesInScans]


@dataclass(frozen=True)
class Prepared:
    """A rank's crops of one step on its device, masked and weighted, and how long that took."""

    micro_batches: list[MicroBatch]
    draws: tuple[Draw, ...]
    read_seconds: float
    """Until the batch was there."""
    copy_seconds: float
    """Masks, and the way to the device."""


@dataclass(kw_only=True)
class Trainer(Learner):
    """What is fixed in a run: stores, split, intensities, crops."""

    store_fingerprints: tuple[str, ...]
    split: Split
    intensity: Intensity
    sampler: CropSampler
    validation: list[Crop]
    """Crops of the held-out patients; empty if nobody is held out."""

    @property
    def crops_at_once(self) -> int:
        """Crops that go through the model at once."""
        return self.config.train.batch // (self.ranks.count * self.config.train.accumulate)

    def loader(self) -> CropLoader | ResidentLoader:
        """Return a loader of this rank's crops: rank r of w takes samples r B/w .. of each step's B."""
        return open_loader(self.sampler, self.config.train, self.device, self.ranks.number, self.ranks.count)

    def prepared(self, batches: Iterable[AnyBatch]) -> Iterator[Prepared]:
        """Mask and copy batches one step ahead, on a thread of its own, while the device works on the step before.

        On a GPU copies have a stream of their own, so their order is said: they begin when the steps that were given
        to the device before this item is are done. The memory of those steps' crops is free by then, and handed out
        again to copies; and the host is never more than a step ahead. A step begins when the copies of its crops have
        ended.
        """
        source, copies = iter(batches), None
        if self.on_gpu:
            copies = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        with ThreadPoolExecutor(1, thread_name_prefix="maesil-prepare") as pool:
            coming = pool.submit(self._prepare_next, source, copies, self._mark())
            while (ready := coming.result()) is not None:
                coming = pool.submit(self._prepare_next, source, copies, self._mark())
                yield ready

    def one_crop(self) -> MicroBatch:
        """Return the first crop of the run by itself, as training sees it."""
        with CropLoader(self.sampler, batch=1, readers=1, ahead=0) as loader:
            (ready,) = self.prepared(loader.batches(0, 1))
        return ready.micro_batches[0]

    def training_step(self, prepared: Prepared) -> None:
        """Take one step, see `Learner.learn`; `Learner.read` tells what it came to."""
        self.learn(prepared.micro_batches, crops="; ".join(map(str, prepared.draws)))

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Score the held-out crops, masked by seeds that never change.

        ``validation_loss`` is the training loss. PSNR is over hidden valid voxels, pooled over all crops (dB of the
        window's width): ``validation_psnr`` of what is shown, ``validation_psnr_tokens`` of the tokens alone where a
        picture head draws what is shown. ``effective_rank`` is how many directions the latent tokens fill
        (`LatentStatistics`, on the first rank's crops). Ranks share the crops out.
        """
        statistics = LatentStatistics()
        with self.final_model.latent_changed(statistics):
            tokens, shown = self._validation_errors()
        alone = {"validation_psnr_tokens": self._psnr(tokens)} if self.model.trained_beside is not None else {}
        return {
            "validation_loss": tokens,
            "validation_psnr": self._psnr(shown),
            **alone,
            "effective_rank": statistics.effective_rank,
        }

    @torch.no_grad()
    def encoder_gains(self) -> dict[str, float]:
        """Return what ``validation_psnr`` loses when latent tokens are replaced by their mean, and when shuffled (dB).

        The names are those of `maesil.evaluation.scores.Scores`.
        """
        as_it_is, gains = self._psnr(self._validation_errors()[1]), {}
        for name, change in (("encoder_gain_db", mean_over_crop), ("encoder_gain_shuffled_db", shuffled)):
            with self.final_model.latent_changed(change):
                gains[name] = as_it_is - self._psnr(self._validation_errors()[1])
        return gains

    def _validation_errors(self) -> tuple[float, float]:
        """Return the mean squared error over the held-out crops: of what the tokens say, and of what is shown."""
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        model, at_once = self.final_model.eval(), self.crops_at_once
        for start in range(self.ranks.number * at_once, len(self.validation), self.ranks.count * at_once):
            crops = self.validation[start : start + at_once]
            inputs = self._input(_stack([crop.hu for crop in crops]), range(start, start + len(crops)))
            weight_BS = self._weights(whole_patches(_stack([crop.valid for crop in crops]), inputs.patch), inputs)
            with self.autocast():
                prediction = model(inputs)
            weight = weight_BS.sum(dtype=torch.float64)
            errors = [inputs.loss(one, weight_BS) * weight for one in (prediction.patches_BSV, prediction.shown)]
            sums += torch.stack([*errors, weight])
        self.model.train()
        tokens, shown, total = self.ranks.sum(sums).tolist()
        if not total:
            raise UsageError("validation: expected hidden patches that lie wholly inside a scan, found none")
        return tokens / total, shown / total

    def _psnr(self, error: float) -> float:
        """Return the PSNR (dB of the window's width) of a mean squared error in normalised units."""
        return -10 * math.log10(error * self.intensity.std**2)

    @torch.no_grad()
    def draw_picture(self, path: Path) -> None:
        """Draw input, mask, reconstruction and error of one crop, of a held-out patient if there is one."""
        from maesil.pictures import save_reconstruction  # matplotlib: a second, and not every step

        hu = self._picture_crop()
        inputs, grid = self._input(torch.from_numpy(hu)[None], [0]), self.config.model.grid
        with self.autocast():
            tokens_BLV = self.final_model.eval().predict_all(inputs)
        self.model.train()
        prediction = unpatchify(to_hu(tokens_BLV.float(), self.intensity), grid, inputs.patch)[0].cpu().numpy()
        hidden = expand_cells(inputs.masks.mask.view(-1, *grid), inputs.patch)
        path.parent.mkdir(parents=True, exist_ok=True)
        window, title = self.intensity.window, f"step {self.step}"
        save_reconstruction(path, hu, hidden[0].cpu().numpy() > 0, prediction, window, title=title)

    def save(self, run_dir: Path) -> None:
        """Write the checkpoint of this step."""
        save_checkpoint(
            run_dir,
            model=self.model,
            averaged=self.averaged,
            optimizer=self.optimizer,
            step=self.step,
            intensity=self.intensity,
            config=self.config,
            split=self.split,
            store_fingerprints=self.store_fingerprints,
            ranks=self.ranks.count,
        )

    def _mark(self) -> torch.cuda.Event | None:
        """Mark what the device was given up to now."""
        return torch.cuda.current_stream(self.device).record_event() if self.on_gpu else None

    def _prepare_next(
        self, batches: Iterator[AnyBatch], copies: torch.cuda.Stream | None, after: torch.cuda.Event | None
    ) -> Prepared | None:
        started = time.monotonic()
        batch = next(batches, None)
        if batch is None:
            return None
        read = time.monotonic()
        if copies is not None and after is not None:
            copies.wait_event(after)
        with torch.cuda.stream(copies):
            micro_batches = [
                self._micro_batch(batch, start) for start in range(0, len(batch.draws), self.crops_at_once)
            ]
        if copies is not None:  # the batch's buffers are filled anew once the next one is asked for
            copies.synchronize()
        return Prepared(micro_batches, batch.draws, read - started, time.monotonic() - read)

    def _micro_batch(self, batch: AnyBatch, start: int) -> MicroBatch:
        chosen = slice(start, start + self.crops_at_once)
        pictured = self._pictured(start)
        inputs = replace(self._training_input(batch, chosen), pictured=pictured or _STAND_IN)
        weight_BS = self._weights(whole_patches(batch.valid[chosen], inputs.patch, batch.flip[chosen]), inputs)
        picture_weight_BS = weight_BS[pictured or _STAND_IN]
        return MicroBatch(inputs, weight_BS, picture_weight_BS if pictured else torch.zeros_like(picture_weight_BS))

    def _training_input(self, batch: AnyBatch, chosen: slice) -> MaskedInput:
        """Return crops as the model sees them: mirrored, windowed and masked as their draws say."""
        draws = batch.draws[chosen]
        model, settings = self.config.model, self.config.train
        seeds = [draw.mask_seed for draw in draws]
        masks, noise_shape = make_masks(self.config.mask, model.grid, seeds, self.device), self.model.noise_shape
        windows = _shifted_windows(settings.window, settings.window_jitter, draws)
        lean = model.kind in MASKED_AUTOENCODERS and model.decoder != "full"
        return MaskedInput(
            self._crops(batch.hu, chosen), masks, self.intensity, model.patch,
            flip_B3=self._to_device(batch.flip[chosen]),
            window_B2=self._to_device(windows) if settings.window_jitter else None,
            ids_target=draw_targets(masks, model.decoded, seeds) if lean else None,
            noise=self._to_device(draw_noise(noise_shape, seeds)) if noise_shape else None,
        )  # fmt: skip

    def _crops(self, hu: Tensor | PlacesInScans, chosen: slice) -> Tensor | CropsInScans:
        """Return crops of a batch on the device. Their buffer is soon filled anew; scans on the device stay."""
        if isinstance(hu, Tensor):
            return self._copied(hu[chosen])
        return CropsInScans(hu.scans[chosen], self._to_device(hu.origin[chosen]), self.config.model.crop)

    def _pictured(self, start: int) -> slice | None:
        """Return which crops of a micro-batch the picture head is trained on, if any.

        They are the same ones of a step, however it is dealt out.
        """
        every = self.config.train.picture_head_every
        first = self.ranks.number * (self.config.train.batch // self.ranks.count) + start
        chosen = slice(-first % every, None, every)
        return chosen if chosen.start < self.crops_at_once else None

    def _input(self, hu: Tensor, mask_seeds: Sequence[int]) -> MaskedInput:
        config = self.config
        masks = make_masks(config.mask, config.model.grid, mask_seeds, self.device)
        return MaskedInput(self._to_device(hu), masks, self.intensity, config.model.patch)

    def _copied(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, copy=True, non_blocking=True)

    def _weights(self, whole_BL: Tensor, inputs: MaskedInput) -> Tensor:
        """Return what each predicted patch counts in the loss: 1 or, beyond the scan, 0: ``[B, S]``."""
        return self._to_device(whole_BL).gather(1, inputs.targets)

    def _to_device(self, tensor: Tensor) -> Tensor:
        return sent(tensor, self.device)

    def _picture_crop(self) -> HuArray:
        """Return the held-out crop with the most body, or the first that training sees."""
        if self.validation:
            return max(self.validation, key=lambda crop: int(crop.body.sum())).hu
        with CropLoader(self.sampler, batch=1, readers=1, ahead=0) as loader:
            hu: HuArray = next(loader.batches(0, 1)).hu[0].numpy()
        return hu


_STAND_IN = slice(0, 1)
"""A crop that weighs nothing: so the picture head has a gradient on every rank, if only of zeros."""


def _shifted_windows(window: Window, jitter: float, draws: Sequence[Draw]) -> Tensor:
    """Return one window per sample, its ends moved as the draws say: float32 ``[B, 2]`` HU."""
    reach = jitter * (window[1] - window[0])
    return torch.tensor([[end + reach * by for end, by in zip(window, d.window_shift, strict=True)] for d in draws])


def _stack(arrays: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(arrays))
