"""Tables: how they are planned for, read, measured, written and shown."""

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfumato.choice import nearest
from sfumato.codecs import TableCodec
from sfumato.config import (
    CodecSettings,
    DataSettings,
    DenoiserSettings,
    SampleSettings,
    Settings,
    StageSettings,
    TrainSettings,
)
from sfumato.data import (
    Column,
    Dialect,
    TableData,
    called,
    check_fill_target,
    check_table_target,
    condition,
    equalities,
    fill_table,
    histograms,
    is_table,
    level_of,
    modelled,
    on_grid,
    read_rows,
    read_table,
    split,
    table_files,
    write_table,
)
from sfumato.errors import UserError
from sfumato.metrics import Copies, Extractor, measured_space, pick, plausible, table_report
from sfumato.metrics.copies import CHECKED
from sfumato.metrics.table import FEWEST, looks_copied
from sfumato.modality.row import Facts, Kinds, Modality, Progress
from sfumato.types import UNKNOWN

NUMBERS = 16  # of a learned latent, at least
FEW, PASSES = 2_000, 75  # of so few rows the denoiser goes through them so often at most: more, and it copies some


def columns_of(mode: Any) -> list[Column]:
    """The columns that `TableData.mode` tells of."""
    return [Column(**column) for column in mode["columns"]]


def plan(given: Settings, facts: Facts, seconds: float) -> Settings:
    """Features as they are for a latent and a perceptron on them, whose steps matter more than its size.

    In five minutes of one core on 32,561 rows, 512 x 6 and batches of 256 did better than of 1,024 (see the log), and
    steps better than width: 1,536 x 6 has 400 of them in ten minutes. Hidden layers that are products learn faster how
    columns go together; a short embedding of the time makes steps shorter by a fifth, and loses nothing.
    More of training goes to little noise than with images: there columns of numbers say the last of one another.
    Rows are drawn with fresh noise in each step: what was decided too early, and does not go together, is mended then.
    """
    batch = min(1024, max(8, 2 ** int(math.log2(max(8, facts.count // 8)))))
    codec = CodecSettings(
        bottleneck="identity",
        latent="vector",
        latent_dim=max(NUMBERS, 2 * facts.shape[0]),
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
        groups=max(NUMBERS, 2 * facts.shape[0]) // 2,
    )
    passes = PASSES if facts.count < FEW else None
    train = TrainSettings(
        codec=StageSettings(batch=batch),
        denoiser=StageSettings(batch=min(256, batch), passes=passes),
        watch=True,
    )
    sample = SampleSettings(sampler="sde", steps=40, grid="ends")
    denoiser = DenoiserSettings(net="mlp", width=512, depth=6, embed=32, gated=True)
    denoiser.times, denoiser.times_settings = "logit_normal", {"mean": -0.5, "std": 1.2}
    return Settings(codec=codec, denoiser=denoiser, train=train, sample=sample)


def codec_options(codec: CodecSettings, shape: tuple[int, ...], mode: Any) -> dict[str, Any]:
    """Arguments of `TableCodec`."""
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
        for c in modelled(columns_of(mode))
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


def parts(source: str, settings: DataSettings, mode: Any = None) -> tuple[TableData, TableData | None]:
    """All rows of a table, and those in a file of their own that are held out."""
    columns = columns_of(mode) if mode else read(source, settings)[0].columns
    files = [read_rows(path, columns) for path in table_files(Path(source).expanduser())]
    return files[0], files[1] if len(files) > 1 else None


def read(source: str, settings: DataSettings, mode: Any = None) -> tuple[TableData, TableData]:
    """Training and held-out rows of a table, with its own columns or those that `mode` tells of."""
    if not mode:
        meant = {"categorical": settings.categorical, "numeric": settings.numeric}
        return read_table(source, **meant, exclude=settings.exclude, held_out=settings.held_out)
    data, held = parts(source, settings, mode)
    return split(data, settings.held_out) if held is None else (data, held)


def made(items: Tensor, labels: Tensor | None, mode: Any, label_names: list[str]) -> TableData:
    """Rows as they would be written: numbers on their grid."""
    columns = columns_of(mode)
    return TableData(on_grid(columns, items.numpy().astype(np.float64)), columns, Dialect(**mode["dialect"]))


def kinds(texts: Sequence[str], balance: str | None, mode: Any) -> Kinds:
    """Rows that fulfil the conditions as they would be written: one kind, or one for each level of a column."""
    columns = columns_of(mode)
    accepts, known = condition(columns, texts), equalities(columns, texts)
    place, levels = (0, list[str]()) if balance is None else level_of(columns, balance)

    def sort(items: Tensor) -> Tensor:
        values = on_grid(columns, items.numpy().astype(np.float64))
        kind = np.nan_to_num(values[:, place], nan=-1) if levels else np.zeros(len(values))
        return torch.from_numpy(np.where(accepts(values), kind, -1).astype(np.int64))

    if not levels:
        return Kinds([" ".join(texts)], sort, torch.from_numpy(known)[None])
    each = np.tile(known, (len(levels), 1))
    each[:, place] = np.arange(len(levels))
    return Kinds([f"{balance}={level}" for level in levels], sort, torch.from_numpy(each))


def check_fit(name: str, shape: tuple[int, ...], mode: Any, source: object, data: TableData) -> None:
    """Refuse a table of other columns."""
    ours, theirs = ([c.name for c in modelled(columns)] for columns in (columns_of(mode), data.columns))
    if ours != theirs:
        odd = sorted(set(ours) ^ set(theirs)) or ours
        raise UserError(f"{name}: its columns are not those of {source}: {', '.join(map(repr, odd[:5]))}", code=1)


def check_whole(source: str, parts: Sequence[TableData], mode: Any) -> None:
    """Refuse rows that lack a cell, or have a level the model does not know, where training rows lacked none."""
    for j, column in enumerate(modelled(columns_of(mode))):
        if column.missing is None and any(np.isnan(part.values[:, j]).any() for part in parts):
            found = f"the column '{column.name}' has missing or unknown cells, of which the model has seen none"
            raise UserError(f"{source}: {found}; leave them empty, and fill them in first with inpaint", code=1)


def compare(x: Tensor, x_hat: Tensor, mode: Any, features: Extractor | None) -> dict[str, float]:
    """`cells`: share of cells that are the same; `error`: mean absolute error of numbers, as share of their range."""
    columns = modelled(columns_of(mode))
    values, values_hat = (on_grid(columns, v.numpy().astype(np.float64)) for v in (x, x_hat))
    same = (values == values_hat) | (np.isnan(values) & np.isnan(values_hat))
    span = np.array([max((c.high or 0.0) - (c.low or 0.0), 1e-300) for c in columns])
    numbers = [j for j, c in enumerate(columns) if not c.levels]
    report = {"cells": float(same.mean())}
    if numbers:
        away = (np.abs(values - values_hat) / span)[:, numbers]
        report["error"] = float(np.nanmean(away)) if not np.isnan(away).all() else 0.0
    return report


def target_of(flag: str, name: str | None, columns: Sequence[Column]) -> int:
    """Which of the learned columns is called so; the last one where nothing is said."""
    names = [column.name for column in columns]
    found = names[-1] if name is None else called(name, names)
    if found is None:
        raise UserError(f"{flag} {name}: no such column among those that are learned; {nearest(str(name), names)}")
    return names.index(found)


class TableJudge:
    """Measures rows against those of one table.

    Args:
        train: The training part.
        device: Not needed.
        progress: Who shows how far it is.
        target: The column that is foretold; default the last one that is learned.
    """

    by_label = False

    def __init__(
        self,
        train: TableData,
        device: str | None = None,
        progress: Progress | None = None,
        target: str | None = None,
    ) -> None:
        columns = modelled(train.columns)
        self.train, self.progress, self.target = train, progress, columns[target_of("--column", target, columns)].name

    def report(self, fake: TableData, held: TableData, cas: bool, seed: int) -> dict[str, Any]:
        """What `sfumato.metrics.table_report` says; with `cas` also how well the target is foretold.

        `memorised` says what `sfumato.metrics.table.looks_copied` does.
        """
        if self.progress is not None:
            self.progress("measure", 0, 1)
        columns = modelled(self.train.columns)
        target = self.target if cas else None
        report = table_report(fake.values, self.train.values, held.values, columns, target=target, seed=seed)
        if self.progress is not None:
            self.progress("measure", 1, 1)
        return {**report, "memorised": looks_copied(report)}

    def compare(self, x: Tensor, x_hat: Tensor) -> dict[str, float]:
        """How close reconstructed rows are."""
        return compare(x, x_hat, self.train.mode, None)


class TableSorter:
    """Sorts made rows by their target column: those that trees of the given rows find implausible belong nowhere.

    Args:
        given: The rows.
        others: None: a table's classes are a column.
        names: The model's classes: none.
        target: The column of the classes; default the last one that is learned.
        device: Not needed.
        progress: Who shows how far it is.
    """

    asked = False

    def __init__(
        self,
        given: TableData,
        others: Sequence[TableData],
        names: Sequence[str],
        target: str | None = None,
        device: str | None = None,
        progress: Progress | None = None,
    ) -> None:
        if others:
            raise UserError("--unlabelled: is for images; leave open the target of a table's rows instead")
        self.columns, self.values, self.progress = modelled(given.columns), given.values, progress
        self.target = target_of("--target", target, self.columns)
        name = self.columns[self.target].name
        self.names = self.columns[self.target].levels
        if not self.names:
            advice = "name one of categories with --target, or train with --categorical"
            raise UserError(f"--target {name}: the column holds numbers, not classes; {advice}")
        self.labels = self.classes(self.values)

    def classes(self, rows: NDArray[np.float64]) -> Tensor:
        """The class number of each row (N, D): (N,)."""
        cells = rows[:, self.target]
        return torch.from_numpy(np.where(np.isnan(cells), UNKNOWN, cells).astype(np.int64))

    @cached_property
    def plausible(self) -> Callable[[NDArray[np.float64]], NDArray[np.bool_]]:
        """Which rows show their class."""
        if self.progress is not None:
            self.progress("sort", 0, 1)
        found = plausible(self.values, self.columns, self.target)
        if self.progress is not None:
            self.progress("sort", 1, 1)
        return found

    def shown(self, items: Tensor) -> Tensor:
        """The class of each row (N, D), `UNKNOWN` where it is not plausible: (N,)."""
        rows = on_grid(self.columns, items.numpy().astype(np.float64))
        return torch.where(torch.from_numpy(self.plausible(rows)), self.classes(rows), UNKNOWN)

    def guessed(self, items: Tensor) -> Tensor:
        """None: the class of a row (N, D) is one of its cells, which `inpaint` fills in."""
        return torch.full((len(items),), UNKNOWN)

    @cached_property
    def space(self) -> Callable[[NDArray[np.float64]], Tensor]:
        """Rows as points."""
        return measured_space(self.values, self.columns, by_range=False, weight=0.5**0.5)

    def points(self, items: Tensor) -> Tensor:
        """Rows (N, D) as points (N, P)."""
        return self.space(on_grid(self.columns, items.numpy().astype(np.float64)))

    @cached_property
    def copies(self) -> Copies:
        """What tells copies of given rows and of made ones."""
        real = self.space(self.values)
        return Copies(lambda: [real], real[pick(len(real), CHECKED)])


def write(out: Path, items: Tensor, rows: list[dict[str, Any]], mode: Any, overwrite: bool) -> None:
    """One file with the columns, types, order and missing values of the original."""
    write_table(
        out, columns_of(mode), items.numpy().astype(np.float64), dialect=Dialect(**mode["dialect"]), overwrite=overwrite
    )


def masks(place: Path | None, source: str, parts: Sequence[TableData], settings: DataSettings) -> Tensor:
    """The empty cells (N, D)."""
    if place is not None:
        raise UserError("--mask is for images: of a table the empty cells are filled in")
    empty = np.concatenate([np.isnan(part.values) for part in parts])
    if not empty.any():
        raise UserError(f"{source}: no cell is empty; leave empty what is to be filled in", code=1)
    return torch.from_numpy(empty)


def fill(out: Path, source: str, mode: Any, overwrite: bool) -> Callable[[Tensor], None]:
    """What writes the source's rows with their empty cells filled in, all others as they stand there."""
    files = table_files(Path(source).expanduser())
    check_fill_target(out, files, overwrite)
    return lambda items: fill_table(out, files, columns_of(mode), items.numpy().astype(np.float64), overwrite)


def sheet(items: Tensor, mode: Any, columns: int | None) -> Any:
    """How each column is distributed."""
    return histograms(modelled(columns_of(mode)), [items.numpy()], columns)


def pairs(x: Tensor, x_hat: Tensor, mode: Any) -> Any:
    """How each column is distributed, before and after."""
    return histograms(modelled(columns_of(mode)), [x.numpy(), x_hat.numpy()], None)


TABLE: Modality[TableData] = Modality(
    name="table",
    recognises=is_table,
    read=read,
    parts=parts,
    made=made,
    plan=plan,
    codec_share=0.4,
    codec=TableCodec,
    codec_options=codec_options,
    judge=TableJudge,
    compare=compare,
    kinds=kinds,
    check_fit=check_fit,
    check_target=check_table_target,
    write=write,
    sheet=sheet,
    pairs=pairs,
    shown=2000,
    fewest=FEWEST,
    example="samples.csv",
    masks=masks,
    fill=fill,
    check_whole=check_whole,
    sorter=TableSorter,
    jump_grid="early",  # which level a row has is decided early on the way from noise
)
