"""The only user of `ctypes`: rows to float32, quantise rows, validate rows, by the functions of one build's ggml.

Consumes the `bin` directory of a build, produces an object whose methods work on numpy arrays. Lives in worker
processes only: an abort inside ggml ends its process.
"""

import ctypes
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType

from gemma_gguf.errors import MissingToolError, VerificationError

_NAMES = ("libggml-base.so", "libggml-base.dylib", "ggml-base.dll")


class Ggml:
    """ggml-base of one build."""

    def __init__(self, bin_dir: Path) -> None:
        found = next((bin_dir / name for name in _NAMES if (bin_dir / name).exists()), None)
        if found is None:
            raise MissingToolError(f"{bin_dir} has no ggml-base library", next_step="Run: gemma-gguf build")
        lib = ctypes.CDLL(str(found))
        size, pointer, kind = ctypes.c_int64, ctypes.c_void_p, ctypes.c_int
        lib.ggml_quantize_init.argtypes = [kind]
        lib.ggml_quantize_init.restype = None
        lib.ggml_quantize_chunk.argtypes = [kind, pointer, pointer, size, size, size, pointer]
        lib.ggml_quantize_chunk.restype = ctypes.c_size_t
        lib.ggml_validate_row_data.argtypes = [kind, pointer, ctypes.c_size_t]
        lib.ggml_validate_row_data.restype = ctypes.c_bool
        lib.ggml_row_size.argtypes = [kind, size]
        lib.ggml_row_size.restype = ctypes.c_size_t
        for widen in (lib.ggml_bf16_to_fp32_row, lib.ggml_fp16_to_fp32_row):
            widen.argtypes = [pointer, pointer, size]
            widen.restype = None
        self._lib = lib

    def row_size(self, ggml_type: GGMLQuantizationType, columns: int) -> int:
        """Bytes of one row."""
        return int(self._lib.ggml_row_size(int(ggml_type), columns))

    def init(self, ggml_type: GGMLQuantizationType) -> None:
        """Build the tables of a type; ggml does so on first use, which would be measured with it."""
        self._lib.ggml_quantize_init(int(ggml_type))

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
        n_rows, columns = rows.shape
        out = np.empty(n_rows * self.row_size(ggml_type, columns), dtype=np.uint8)
        data = None if weights is None else weights.ctypes.data
        written = self._lib.ggml_quantize_chunk(
            int(ggml_type), rows.ctypes.data, out.ctypes.data, 0, n_rows, columns, data
        )
        if written != out.size or not self._lib.ggml_validate_row_data(int(ggml_type), out.ctypes.data, out.size):
            raise VerificationError(f"ggml made invalid {ggml_type.name} data")
        return out
