"""Weights from learned tables: w ≈ table[code], one table of 2^bits values per row or per (row, group), plus outliers.

Shapes: W is [N, K]; a group is `group_size` neighbours along K, so G = K / group_size tables a row. The values of a
table rise, so that the nearest one to w is found by counting the midpoints below w. Tables are rounded to
`table_dtype` first and codes are chosen with the rounded ones.

Dense and sparse (SqueezeLLM, arXiv 2306.07629, section 4.2). A share `sparse` of the weights, round(sparse·N·K) of them,
is stored a second time in compressed sparse rows (CSR): row n has the entries starts[n] to starts[n+1], each a column
and a value. The value is what the table leaves, w - table[code] rounded to `table_dtype`, so that

    Ŵ = table[codes] + S,   y = x·table[codes]ᵀ + x·Sᵀ,

and a kernel adds the two products without looking at codes. (SqueezeLLM's own files store w and make the table's part
zero, which costs a table entry at 0.)

Tables come from `dlqc.rounding.kmeans`; this file only stores and applies them. All arithmetic is float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from dlqc.errors import ContractError, FeasibilityError, RecipeError
from dlqc.formats.contract import Part
from dlqc.formats.integer import SCALE_DTYPES, _not_finite, _row_chunks
from dlqc.formats.packing import pack, packed_shape, unpack

BITS = (2, 3, 4)


@dataclass(frozen=True)
class CodebookFormat:
    """Tables of learned values.

    Attributes:
        bits: width of a code, 2, 3 or 4.
        group_size: input features that share a table; None means one table per output channel.
        sparse: share of the weights that are also stored in CSR, 0 to 0.5; SqueezeLLM has 0.0045.
        table_dtype: "bfloat16", "float16" or "float32", of tables and of sparse values.
    """

    name: ClassVar[str] = "codebook"

    bits: int
    group_size: int | None = None
    sparse: float = 0.0
    table_dtype: str = "float16"

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise RecipeError(f"{self.bits!r} is not a width of a codebook", where="bits", remedy="Use 2, 3 or 4")
        if self.group_size is not None and self.group_size < 1:
            what = f"a group of {self.group_size} input features is impossible"
            raise RecipeError(what, where="group_size", remedy="Use 512 or more, or None for one table per channel")
        if not 0 <= self.sparse <= 0.5:
            what = f"a share of {self.sparse} sparse weights is not within 0 and 0.5"
            raise RecipeError(what, where="sparse", remedy="Use 0.0045")
        if self.table_dtype not in SCALE_DTYPES:
            remedy = f"Use {', '.join(SCALE_DTYPES)}"
            raise RecipeError(f"tables cannot be stored as {self.table_dtype!r}", where="table_dtype", remedy=remedy)

    @property
    def dtype(self) -> torch.dtype:
        """`table_dtype` as torch has it."""
        return SCALE_DTYPES[self.table_dtype]

    @property
    def entries(self) -> int:
        """Values in a table, 2^bits."""
        return 1 << self.bits

    @property
    def label(self) -> str:
        """A short name for reports.

        >>> CodebookFormat(3).label, CodebookFormat(4, 512, 0.0045).label
        ('codebook3 channel', 'codebook4 g512 +0.45% sparse')
        """
        group = "channel" if self.group_size is None else f"g{self.group_size}"
        return f"codebook{self.bits} {group}" + (f" +{100 * self.sparse:g}% sparse" if self.sparse else "")

    def check(self, in_features: int) -> str | None:
        """None if a weight with `in_features` columns can be stored, else the reason it cannot, one clause.

        >>> CodebookFormat(4, group_size=96).check(11008)
        '11008 input features do not divide by group 96'
        """
        if self.group_size is None or (in_features > 0 and in_features % self.group_size == 0):
            return None
        return f"{in_features} input features do not divide by group {self.group_size}"

    def groups(self, in_features: int) -> int:
        """G, the number of groups in a row; a FeasibilityError if the group does not divide."""
        reason = self.check(in_features)
        if reason is not None:
            remedy = "Use a divisor, or None for one table per channel"
            raise FeasibilityError(reason, where="group_size", remedy=remedy)
        return 1 if self.group_size is None else in_features // self.group_size

    def outliers(self, out_features: int, in_features: int) -> int:
        """Weights of a [N, K] matrix that are stored in CSR.

        >>> CodebookFormat(4, sparse=0.0045).outliers(4096, 4096)
        75497
        """
        return round(self.sparse * out_features * in_features)

    def bits_per_weight(self, out_features: int, in_features: int) -> float:
        """Stored bits of a [N, K] weight over N·K: codes, tables and CSR (not the padding of packed rows to words).

        >>> CodebookFormat(4).bits_per_weight(4096, 4096), CodebookFormat(3).bits_per_weight(4096, 4096)
        (4.0625, 3.03125)
        >>> round(CodebookFormat(3, sparse=0.0045).bits_per_weight(4096, 4096), 3)
        3.183
        """
        width = 8 * self.dtype.itemsize
        total = out_features * (in_features * self.bits + self.groups(in_features) * self.entries * width)
        if self.sparse:
            total += self.outliers(out_features, in_features) * (width + 8 * _column_dtype(in_features).itemsize)
            total += 32 * (out_features + 1)
        return total / (out_features * in_features)

    def stored(self, tables: torch.Tensor) -> torch.Tensor:
        """Tables [N, G, 2^bits] of any floating dtype in `table_dtype`, each sorted."""
        rounded = tables.to(self.dtype)
        if not bool(torch.isfinite(rounded.float()).all()):
            what = f"table values reach {tables.abs().max().item():.3g}: they do not fit {self.table_dtype}"
            raise FeasibilityError(what, where="table_dtype", remedy="Use 'bfloat16' or 'float32'")
        return rounded.float().sort(dim=-1).values.to(self.dtype)

    def encode(self, weight: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
        """Codes uint8 [N, K] of the table values nearest to `weight` [N, K]; `tables` [N, G, 2^bits] as `stored`.

        Halfway between two values the lower one is taken.
        """
        count, width = weight.shape
        groups = self.groups(width)
        if tables.shape != (count, groups, self.entries) or tables.dtype != self.dtype:
            found = f"{tuple(tables.shape)} {tables.dtype}"
            what = f"tables are {found}, not {(count, groups, self.entries)} torch.{self.table_dtype}"
            raise ContractError(what, where="tables")
        codes = torch.empty(count, width, dtype=torch.uint8, device=weight.device)
        for rows in _row_chunks(count, width):
            part = weight[rows].to(torch.float32).reshape(-1, groups, width // groups)
            if not bool(torch.isfinite(part.sum())) and not bool(torch.isfinite(part).all()):
                raise _not_finite(weight)
            middle = midpoints(tables[rows].float()).unsqueeze(-1)
            chosen = (part > middle[:, :, 0]).to(torch.uint8)
            for place in range(1, self.entries - 1):
                chosen += part > middle[:, :, place]
            codes[rows] = chosen.reshape(-1, width)
        return codes

    def quantize(
        self, weight: torch.Tensor, tables: torch.Tensor, outlier: torch.Tensor | None = None
    ) -> CodebookWeight:
        """Round `weight` [N, K] to nearest in the given tables.

        Args:
            tables: [N, G, 2^bits], any floating dtype.
            outlier: bool [N, K] with `outliers(N, K)` true elements, those stored in CSR; None if `sparse` is 0.
        """
        tables = self.stored(tables)
        codes = self.encode(weight, tables)
        if outlier is None:
            return CodebookWeight(codes, tables, None, None, None, self)
        rows, columns = torch.nonzero(outlier, as_tuple=True)
        group = columns // (weight.shape[1] // tables.shape[1])
        rest = weight[rows, columns].float() - tables[rows, group, codes[rows, columns].long()].float()
        return self.assemble(codes, tables, rows, columns, rest)

    def assemble(
        self,
        codes: torch.Tensor,
        tables: torch.Tensor,
        rows: torch.Tensor,
        columns: torch.Tensor,
        values: torch.Tensor,
    ) -> CodebookWeight:
        """A weight from codes, stored tables and the coordinates and values of sparse entries, in any order."""
        count, width = codes.shape
        order = torch.argsort(rows * width + columns)
        stored = values[order].to(self.dtype)
        if not bool(torch.isfinite(stored.float()).all()):
            what = f"sparse values reach {values.abs().max().item():.3g}: they do not fit {self.table_dtype}"
            raise FeasibilityError(what, where="table_dtype", remedy="Use 'bfloat16' or 'float32'")
        ends = torch.bincount(rows, minlength=count).cumsum(0)
        starts = torch.cat([torch.zeros_like(ends[:1]), ends]).to(torch.int32)
        return CodebookWeight(codes, tables, starts, columns[order].to(_column_dtype(width)), stored, self)

    def parts_of(self, out_features: int, in_features: int) -> dict[str, Part]:
        """Shape and dtype of each stored tensor of a [N, K] weight."""
        parts: dict[str, Part] = {
            "codes": (packed_shape(out_features, in_features, self.bits), torch.uint8),
            "tables": ((out_features, self.groups(in_features), self.entries), self.dtype),
        }
        if self.sparse:
            entries = (self.outliers(out_features, in_features),)
            parts |= {"starts": ((out_features + 1,), torch.int32)}
            parts |= {"columns": (entries, _column_dtype(in_features)), "values": (entries, self.dtype)}
        return parts

    def unpack(self, parts: Mapping[str, torch.Tensor], in_features: int) -> CodebookWeight:
        """The weight that `CodebookWeight.pack` was called on, K = `in_features`."""
        codes = unpack(parts["codes"], self.bits, in_features)
        sparse = (parts.get("starts"), parts.get("columns"), parts.get("values"))
        return CodebookWeight(codes, parts["tables"], *sparse, self)


@dataclass(frozen=True, eq=False)
class CodebookWeight:
    """A weight [N, K] in tables, not packed.

    Attributes:
        codes: uint8 [N, K], below 2^bits.
        tables: [N, G, 2^bits] in `format.table_dtype`, rising.
        starts: int32 [N + 1], CSR; None, as the next two, if `format.sparse` is 0.
        columns: uint16 [S], or int32 if K > 65536; rising in each row.
        values: [S] in `format.table_dtype`, added to what the tables give.
        format: the number format.
    """

    codes: torch.Tensor
    tables: torch.Tensor
    starts: torch.Tensor | None
    columns: torch.Tensor | None
    values: torch.Tensor | None
    format: CodebookFormat

    def __post_init__(self) -> None:
        count, width = self.codes.shape
        shape = (count, self.format.groups(width), self.format.entries)
        if self.codes.dtype != torch.uint8:
            raise ContractError(f"codes are {self.codes.dtype}, not torch.uint8", where="codes")
        if self.tables.shape != shape or self.tables.dtype != self.format.dtype:
            found = f"{tuple(self.tables.shape)} {self.tables.dtype}"
            raise ContractError(f"tables are {found}, not {shape} torch.{self.format.table_dtype}", where="tables")
        parts = [part is not None for part in (self.starts, self.columns, self.values)]
        if not all(part == (self.format.sparse > 0) for part in parts):
            verb = "needs all of" if self.format.sparse else "has no"
            raise ContractError(f"a weight in {self.format.label} {verb} starts, columns, values", where="starts")
        if self.starts is None or self.columns is None or self.values is None:
            return
        if self.starts.shape != (count + 1,) or self.starts.dtype != torch.int32:
            found = f"{tuple(self.starts.shape)} {self.starts.dtype}"
            raise ContractError(f"row starts are {found}, not ({count + 1},) torch.int32", where="starts")
        entries = (self.format.outliers(count, width),)
        for name, part, dtype in (
            ("columns", self.columns, _column_dtype(width)),
            ("values", self.values, self.format.dtype),
        ):
            if part.shape != entries or part.dtype != dtype:
                found = f"{tuple(part.shape)} {part.dtype}"
                raise ContractError(f"sparse {name} are {found}, not {entries} {dtype}", where=name)

    def dequantize(self) -> torch.Tensor:
        """The float32 weight [N, K] that is stood for: table[code], plus the sparse values."""
        count, width = self.codes.shape
        groups = self.tables.shape[1]
        tables, codes = self.tables.float(), self.codes.reshape(count, groups, -1)
        dense = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
        for rows in _row_chunks(count, width):
            dense[rows] = tables[rows].gather(2, codes[rows].long())
        dense = dense.reshape(count, width)
        if self.starts is not None and self.columns is not None and self.values is not None:
            rows_of = torch.repeat_interleave(torch.arange(count, device=dense.device), self.starts.diff())
            dense[rows_of, self.columns.long()] += self.values.float()
        return dense

    def pack(self) -> dict[str, torch.Tensor]:
        """Stored tensors: "codes" as in `dlqc.formats.packing`, "tables", and "starts", "columns", "values" if sparse."""
        parts = {"codes": pack(self.codes, self.format.bits), "tables": self.tables}
        if self.starts is not None and self.columns is not None and self.values is not None:
            parts |= {"starts": self.starts, "columns": self.columns, "values": self.values}
        return parts


def midpoints(tables: torch.Tensor) -> torch.Tensor:
    """Midpoints [..., n - 1] of neighbouring values of rising tables [..., n]; halved first, so that none overflows."""
    return tables[..., 1:] / 2 + tables[..., :-1] / 2


def _column_dtype(in_features: int) -> torch.dtype:
    return torch.uint16 if in_features <= 1 << 16 else torch.int32
