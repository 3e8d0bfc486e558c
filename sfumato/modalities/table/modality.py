"""The modality of tables."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sfumato.config import (
    CodecSettings,
    DataSettings,
    DenoiserSettings,
    SampleSettings,
    Settings,
    StageSettings,
    TrainSettings,
)
from sfumato.data.dataset import split
from sfumato.errors import UserError
from sfumato.metrics import Extractor
from sfumato.modalities.base import Conditional, Labelable, Maskable, Modality, PlanContext, Strata
from sfumato.modalities.table.codec import TableCodec
from sfumato.modalities.table.columns import columns_from_spec, modelled, round_values
from sfumato.modalities.table.dataset import TableDataset
from sfumato.modalities.table.evaluator import TableEvaluator, cell_metrics
from sfumato.modalities.table.filters import balance_levels, fixed_values, parse_conditions
from sfumato.modalities.table.formats import Dialect
from sfumato.modalities.table.impute import check_imputed_output, write_imputed
from sfumato.modalities.table.labeler import TableLabeler
from sfumato.modalities.table.metrics import MIN_ROWS
from sfumato.modalities.table.plot import histograms
from sfumato.modalities.table.read import is_table, read_rows, read_table, table_files
from sfumato.modalities.table.write import check_table_output, write_table
from sfumato.types import Items, Progress

MIN_LATENT_DIM = 16  # smallest dimension of a learned latent
SMALL_TABLE_ROWS = 2_000  # below this number of rows the epochs are limited
SMALL_TABLE_EPOCHS = 75  # maximum epochs of the denoiser on a small table; with more it copies rows


def plan_table(context: PlanContext) -> Settings:
    """An identity codec and an MLP denoiser, for which more steps matter more than a larger network.

    On 32,561 rows in five minutes on one core, 512 x 6 was better with batches of 256 than of 1,024 (see the log), and
    more steps were better than more width: 1,536 x 6 takes only 400 steps in ten minutes. SwiGLU learns the dependence
    between columns faster; a small time embedding makes steps a fifth shorter at no loss. Training favours low noise
    more than for images: only there do columns of numbers determine each other precisely. The sampler is stochastic:
    its fresh noise corrects levels that were decided too early and do not fit together.
    """
    batch = min(1024, max(8, 2 ** int(math.log2(max(8, context.count // 8)))))
    codec = CodecSettings(
        bottleneck="identity",
        latent="vector",
        latent_dim=max(MIN_LATENT_DIM, 2 * context.shape[0]),
        downsample=1,
        channels=1,
        width=512,
        depth=2,
        kl_weight=1e-3,
        perceptual="none",
        perceptual_weight=0.0,
        adversarial_weight=0.0,
        reconstruction="l2",
        codebook_size=512,
        groups=max(MIN_LATENT_DIM, 2 * context.shape[0]) // 2,
    )
    max_epochs = SMALL_TABLE_EPOCHS if context.count < SMALL_TABLE_ROWS else None
    train = TrainSettings(
        codec=StageSettings(batch=batch),
        denoiser=StageSettings(batch=min(256, batch), max_epochs=max_epochs),
        early_stopping=True,
    )
    sample = SampleSettings(sampler="sde", steps=40, grid="both_ends")
    denoiser = DenoiserSettings(net="mlp", width=512, depth=6, embedding_dim=32, swiglu=True)
    denoiser.time_sampling, denoiser.time_sampling_settings = "logit_normal", {"mean": -0.5, "std": 1.2}
    return Settings(codec=codec, denoiser=denoiser, train=train, sample=sample)


def check_no_labels(settings: DataSettings) -> None:
    """Refuse columns of labels, which are for images."""
    if settings.label_column:
        names = ",".join(settings.label_column)
        raise UserError(f"--label-column {names}: is for images; a table's columns are all learned")


class TableModality(Modality[TableDataset], Maskable[TableDataset], Conditional, Labelable[TableDataset]):
    """Tables of numbers, categories and dates, with missing cells."""

    name = "table"
    codec_class = TableCodec
    codec_share = 0.4
    preview_items = 2000
    min_items = MIN_ROWS
    example_output = "samples.csv"
    jump_grid = "noise"  # categories are decided early in the reverse process

    def recognises(self, source: str) -> bool:
        return is_table(source)

    def read(self, source: str, settings: DataSettings, spec: Any = None) -> tuple[TableDataset, TableDataset | None]:
        check_no_labels(settings)
        columns = columns_from_spec(spec) if spec else self.read_split(source, settings)[0].columns
        files = [read_rows(path, columns) for path in table_files(Path(source).expanduser())]
        return files[0], files[1] if len(files) > 1 else None

    def read_split(self, source: str, settings: DataSettings, spec: Any = None) -> tuple[TableDataset, TableDataset]:
        """Without a spec the columns are inferred, with the ranges of the training part."""
        check_no_labels(settings)
        if not spec:
            return read_table(
                source,
                categorical=settings.categorical,
                numeric=settings.numeric,
                exclude=settings.exclude,
                held_out=settings.held_out,
            )
        data, held = self.read(source, settings, spec)
        return split(data, settings.held_out) if held is None else (data, held)

    def from_samples(self, items: Items, labels: Tensor | None, spec: Any, label_names: list[str]) -> TableDataset:
        columns = columns_from_spec(spec)
        return TableDataset(
            round_values(columns, items.stack().numpy().astype(np.float64)), columns, Dialect(**spec["dialect"])
        )

    def plan(self, given: Settings, context: PlanContext, seconds: float) -> Settings:
        return plan_table(context)

    def codec_config(self, codec: CodecSettings, shape: tuple[int, ...], spec: Any) -> dict[str, Any]:
        columns = [
            {
                "name": c.name,
                "levels": len(c.levels),
                "missing": c.missing is not None,
                "spikes": c.spikes,
                "other": c.other,
                "low": c.low,
                "high": c.high,
            }
            for c in modelled(columns_from_spec(spec))
        ]
        return {
            "columns": columns,
            "bottleneck": codec.bottleneck,
            "latent_dim": codec.latent_dim,
            "width": codec.width,
            "depth": codec.depth,
            "codebook_size": codec.codebook_size,
            "groups": codec.groups,
            "levels": None if codec.levels is None else list(codec.levels),
        }

    def evaluator(
        self, train: TableDataset, device: str | None, progress: Progress | None, target_column: str | None
    ) -> TableEvaluator:
        return TableEvaluator(train, device, progress, target_column)

    def reconstruction_metrics(
        self, x: Items, x_hat: Items, spec: Any, features: Extractor | None = None
    ) -> dict[str, float]:
        """`cells`: share of equal cells; `error`: mean absolute error of numbers relative to their range."""
        return cell_metrics(x.stack(), x_hat.stack(), spec)

    def strata(self, conditions: Sequence[str], balance: str | None, spec: Any) -> Strata:
        """Rounded rows that match the conditions: one stratum, or one per level of a balanced column."""
        columns = columns_from_spec(spec)
        matches, fixed = parse_conditions(columns, conditions), fixed_values(columns, conditions)
        j, levels = (0, list[str]()) if balance is None else balance_levels(columns, balance)

        def assign(items: Items) -> Tensor:
            values = round_values(columns, items.stack().numpy().astype(np.float64))
            stratum = np.nan_to_num(values[:, j], nan=-1) if levels else np.zeros(len(values))
            return torch.from_numpy(np.where(matches(values), stratum, -1).astype(np.int64))

        if not levels:
            return Strata([" ".join(conditions)], assign, torch.from_numpy(fixed)[None])
        fixed = np.tile(fixed, (len(levels), 1))
        fixed[:, j] = np.arange(len(levels))
        return Strata([f"{balance}={level}" for level in levels], assign, torch.from_numpy(fixed))

    def check_compatible(
        self, name: str, shape: tuple[int, ...], spec: Any, source: object, data: TableDataset
    ) -> None:
        names, source_names = ([c.name for c in modelled(cs)] for cs in (columns_from_spec(spec), data.columns))
        if names != source_names:
            differing = sorted(set(names) ^ set(source_names)) or names
            message = f"{name}: its columns are not those of {source}: {', '.join(map(repr, differing[:5]))}"
            raise UserError(message, code=1)

    def check_complete(self, source: str, parts: Sequence[TableDataset], spec: Any) -> None:
        """Raise if cells are missing or unknown in a column that has no missing cells in the training rows."""
        for j, column in enumerate(modelled(columns_from_spec(spec))):
            if column.missing is None and any(np.isnan(part.values[:, j]).any() for part in parts):
                found = f"the column '{column.name}' has missing or unknown cells, and the training rows had none"
                raise UserError(f"{source}: {found}; leave them empty, and fill them in first with inpaint", code=1)

    def check_output(self, out: Path, overwrite: bool) -> None:
        check_table_output(out, overwrite)

    def write(self, out: Path, items: Items, metadata: list[dict[str, Any]], spec: Any, overwrite: bool) -> None:
        """Write one file with the columns, types, order and missing cells of the source."""
        values, dialect = items.stack().numpy().astype(np.float64), Dialect(**spec["dialect"])
        write_table(out, columns_from_spec(spec), values, dialect=dialect, overwrite=overwrite)

    def preview(self, items: Items, spec: Any, reconstructed: Items | None = None, columns: int | None = None) -> Any:
        """A histogram of each column, of one table or of two."""
        tables = [items] if reconstructed is None else [items, reconstructed]
        return histograms(modelled(columns_from_spec(spec)), [table.stack().numpy() for table in tables], columns)

    def contract_source(self, folder: Path) -> str:
        """A number, a category, and a date with missing cells."""
        days = [f"2024-{1 + i % 12:02}-{1 + i % 28:02}" for i in range(200)]
        rows = [f"{i % 17}.{i % 10},{'red' if i % 3 else 'blue'},{days[i] if i % 5 else ''}" for i in range(200)]
        (folder / "rows.csv").write_text("size,colour,since\n" + "\n".join(rows) + "\n", encoding="utf-8")
        return str(folder / "rows.csv")

    def read_masks(
        self, path: Path | None, source: str, parts: Sequence[TableDataset], settings: DataSettings
    ) -> Tensor:
        """The missing cells, bool (N, D)."""
        if path is not None:
            raise UserError("--mask is for images; in a table the empty cells are imputed")
        missing = np.concatenate([np.isnan(part.values) for part in parts])
        if not missing.any():
            raise UserError(f"{source}: no cell is empty; leave the cells to impute empty", code=1)
        return torch.from_numpy(missing)

    def fill_writer(self, out: Path, source: str, spec: Any, overwrite: bool) -> Callable[[Items], None]:
        """A writer of the source's rows with imputed missing cells; every other cell stays as it is."""
        files, columns = table_files(Path(source).expanduser()), columns_from_spec(spec)
        check_imputed_output(out, files, overwrite)
        return lambda items: write_imputed(out, files, columns, items.stack().numpy().astype(np.float64), overwrite)

    def labeler(
        self,
        given: TableDataset,
        unlabelled: Sequence[TableDataset],
        names: Sequence[str],
        target_column: str | None,
        device: str | None,
        progress: Progress | None,
    ) -> TableLabeler:
        return TableLabeler(given, unlabelled, names, target_column, device, progress)
