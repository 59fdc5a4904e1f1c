"""Whether rows of indices hold one twice, on the CPU: a table of the row that had a number last."""

import numpy as np

from dynattn.kernels.simd import compiled


@compiled
def distinct_rows(indices, below, lengths=None):
    """Whether no row of (rows, n), or of its first `lengths`, holds a number of range(below) twice."""
    seen = np.full(below, -1)
    for row in range(indices.shape[0]):
        for a in range(indices.shape[1] if lengths is None else lengths[row]):
            if seen[indices[row, a]] == row:
                return False
            seen[indices[row, a]] = row
    return True
