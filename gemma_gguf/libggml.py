"""The only user of `ctypes`: rows to float32, quantise rows, validate rows, by one build's ggml or by the kernels.

Consumes the `bin` directory of a build and the compiled kernels (`kernels/`); produces an object whose methods work on
numpy arrays. `quantize` takes whichever implementation is approved for a type: the bytes are the same, and nobody else
knows which ran. Lives in worker processes only: an abort inside ggml ends its process.
"""

import ctypes
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType

from gemma_gguf.errors import MissingToolError, VerificationError

_NAMES = ("libggml-base.so", "libggml-base.dylib", "ggml-base.dll")

KERNEL_TYPES = tuple(
    GGMLQuantizationType[name]
    for name in (
        *("Q4_0", "Q4_1", "Q5_0", "Q5_1"),
        *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
        *("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"),
    )
)


@dataclass(frozen=True)
class Kernels:
    """A compiled kernel library, the instruction set it was checked with, and the types it is approved for."""

    library: Path
    isa: str
    types: tuple[GGMLQuantizationType, ...]

    def document(self) -> dict[str, Any]:
        """As JSON, for a worker on another machine."""
        return {"library": str(self.library), "isa": self.isa, "types": [kind.name for kind in self.types]}

    @classmethod
    def parse(cls, document: dict[str, Any] | None) -> "Kernels | None":
        """What `document` gave, or None."""
        if document is None:
            return None
        types = tuple(GGMLQuantizationType[name] for name in document["types"])
        return cls(Path(document["library"]), document["isa"], types)


class KernelLibrary:
    """The C functions of `kernels/kernels.h`."""

    def __init__(self, path: Path) -> None:
        lib = ctypes.CDLL(str(path))
        size, pointer, kind = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int
        lib.gemma_quantize.argtypes = [kind, pointer, pointer, size, size, pointer]
        lib.gemma_quantize.restype = ctypes.c_size_t
        lib.gemma_kernels_isa.argtypes = []
        lib.gemma_kernels_isa.restype = ctypes.c_char_p
        lib.gemma_kernels_force_isa.argtypes = [ctypes.c_char_p]
        lib.gemma_kernels_force_isa.restype = kind
        lib.gemma_kernels_version.argtypes = []
        lib.gemma_kernels_version.restype = kind
        self._lib = lib

    @property
    def version(self) -> int:
        return int(self._lib.gemma_kernels_version())

    @property
    def isa(self) -> str:
        """The instruction set in use: avx2, avx512, or none when every call is left to ggml."""
        return bytes(self._lib.gemma_kernels_isa()).decode()

    def force_isa(self, name: str) -> bool:
        """Use an instruction set (`auto`: the CPU's best) in this process; False when it is not there."""
        return bool(self._lib.gemma_kernels_force_isa(name.encode()))

    def quantize(
        self,
        rows: npt.NDArray[np.float32],
        ggml_type: GGMLQuantizationType,
        weights: npt.NDArray[np.float32] | None,
        out: npt.NDArray[np.uint8],
    ) -> bool:
        """Fill `out` with the quantised rows; False, and anything in `out`, when this case is left to ggml."""
        n_rows, columns = rows.shape
        data = None if weights is None else weights.ctypes.data
        written = self._lib.gemma_quantize(int(ggml_type), rows.ctypes.data, out.ctypes.data, n_rows, columns, data)
        return bool(written == out.size)


class Ggml:
    """ggml-base of one build, with kernels in the place of its quantisers for the types they are approved for."""

    def __init__(self, bin_dir: Path, kernels: Kernels | None = None) -> None:
        found = next((bin_dir / name for name in _NAMES if (bin_dir / name).exists()), None)
        if found is None:
            raise MissingToolError(f"{bin_dir} has no ggml-base library", next_step="Run: gemma-gguf build")
        lib = ctypes.CDLL(str(found))
        size, pointer, kind = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int
        lib.ggml_quantize_chunk.argtypes = [kind, pointer, pointer, size, size, size, pointer]
        lib.ggml_quantize_chunk.restype = ctypes.c_size_t
        lib.ggml_validate_row_data.argtypes = [kind, pointer, ctypes.c_size_t]
        lib.ggml_validate_row_data.restype = ctypes.c_bool
        lib.ggml_row_size.argtypes = [kind, size]
        lib.ggml_row_size.restype = ctypes.c_size_t
        lib.ggml_quantize_requires_imatrix.argtypes = [kind]
        lib.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
        for widen in (lib.ggml_bf16_to_fp32_row, lib.ggml_fp16_to_fp32_row):
            widen.argtypes = [pointer, pointer, size]
            widen.restype = None
        self._lib = lib
        self._kernels: KernelLibrary | None = None
        self.approved: frozenset[GGMLQuantizationType] = frozenset()  # types that kernels quantise here
        if kernels is not None:
            library = KernelLibrary(kernels.library)
            # A worker on another machine may have another CPU: what was not checked is not used.
            if library.isa == kernels.isa:
                self._kernels, self.approved = library, frozenset(kernels.types)

    def row_size(self, ggml_type: GGMLQuantizationType, columns: int) -> int:
        """Bytes of one row."""
        return int(self._lib.ggml_row_size(int(ggml_type), columns))

    def requires_imatrix(self, ggml_type: GGMLQuantizationType) -> bool:
        """Whether ggml aborts without one."""
        return bool(self._lib.ggml_quantize_requires_imatrix(int(ggml_type)))

    def widen(self, raw: npt.NDArray[np.uint8], ggml_type: GGMLQuantizationType) -> npt.NDArray[np.float32]:
        """Raw rows of F32, F16 or BF16, shape (rows, bytes), as float32, shape (rows, columns)."""
        if ggml_type is GGMLQuantizationType.F32:
            return raw.view(np.float32)
        convert = {
            GGMLQuantizationType.F16: self._lib.ggml_fp16_to_fp32_row,
            GGMLQuantizationType.BF16: self._lib.ggml_bf16_to_fp32_row,
        }[ggml_type]
        out = np.empty((raw.shape[0], raw.shape[1] // 2), dtype=np.float32)
        convert(raw.ctypes.data, out.ctypes.data, out.size)
        return out

    def quantize(
        self,
        rows: npt.NDArray[np.float32],
        ggml_type: GGMLQuantizationType,
        weights: npt.NDArray[np.float32] | None,
    ) -> npt.NDArray[np.uint8]:
        """Quantise rows, shape (rows, columns), by an imatrix row of shape (columns,) or without one.

        Returns raw bytes, flat. Raises `VerificationError` when ggml finds its own result invalid (NaN or Inf scales).
        """
        out = np.empty(len(rows) * self.row_size(ggml_type, rows.shape[1]), dtype=np.uint8)
        taken = (
            self._kernels is not None
            and ggml_type in self.approved
            and self._kernels.quantize(rows, ggml_type, weights, out)
        )
        if not taken:
            self.reference(rows, ggml_type, weights, out)
        if not self._lib.ggml_validate_row_data(int(ggml_type), out.ctypes.data, out.size):
            raise VerificationError(f"ggml made invalid {ggml_type.name} data")
        return out

    def reference(
        self,
        rows: npt.NDArray[np.float32],
        ggml_type: GGMLQuantizationType,
        weights: npt.NDArray[np.float32] | None,
        out: npt.NDArray[np.uint8],
    ) -> None:
        """Fill `out` by ggml's own quantiser, whatever is approved."""
        n_rows, columns = rows.shape
        data = None if weights is None else weights.ctypes.data
        written = self._lib.ggml_quantize_chunk(
            int(ggml_type), rows.ctypes.data, out.ctypes.data, 0, n_rows, columns, data
        )
        if written != out.size:
            raise VerificationError(f"ggml wrote {written} bytes of {ggml_type.name}, {out.size} were expected")
