"""Cholesky: factors of a Gram matrix, most of whose work is matrix products.

    A = L Lᵀ    in panels of BLOCK columns from the left: what the panels before say of one is a product, its own
                triangle is LAPACK's, what is below it a product with that triangle's inverse
    B A⁻¹       in panels too, to the right with Lᵀ and back with L

The operations are LAPACK's, C³/3 and 2·R·C², and BLOCK/C more. On a CPU they take a half to a third of its time (at
1536 to 4096 columns, one core): products are what CPUs are fastest at, and `torch.linalg.cholesky` goes over its result
once more to clear the other triangle. On a GPU the library does it: products there may be rounded (`--tf32`), factors
must not be.
"""

from dataclasses import dataclass, field

import torch

BLOCK = 128  # columns of a panel


@dataclass
class Factor:
    """The lower factor of a symmetric positive definite matrix. L: (C, C). inverses: of L's triangles on the diagonal,
    as far as they were needed."""

    L: torch.Tensor
    inverses: list[torch.Tensor] = field(default_factory=list)

    @property
    def panels(self) -> list[slice]:
        """The columns of each panel."""
        return panels(len(self.L))

    def inverse(self, number: int) -> torch.Tensor:
        """The inverse of the triangle of a panel; those of the panels before are there."""
        if number == len(self.inverses):
            D = self.L[self.panels[number], self.panels[number]]
            one = torch.eye(len(D), dtype=D.dtype, device=D.device)
            self.inverses.append(torch.linalg.solve_triangular(D, one, upper=False))
        return self.inverses[number]

    def solve(self, B: torch.Tensor) -> torch.Tensor:
        """B A⁻¹, (R, C), for B (R, C) in the factor's dtype."""
        if B.device.type != "cpu":
            return torch.cholesky_solve(B.T, self.L).T.contiguous()
        L, X = self.L, torch.empty_like(B, memory_format=torch.contiguous_format)
        for number, own in enumerate(self.panels):
            left = B[:, own] if not number else torch.addmm(B[:, own], X[:, :own.start], L[own, :own.start].T, alpha=-1)
            X[:, own] = left @ self.inverse(number).T
        for number, own in reversed([*enumerate(self.panels)]):
            last = own.stop == len(L)
            right = X[:, own] if last else torch.addmm(X[:, own], X[:, own.stop:], L[own.stop:, own], alpha=-1)
            X[:, own] = right @ self.inverse(number)
        return X


def panels(C: int) -> list[slice]:
    """The columns of each panel of a matrix (C, C)."""
    return [slice(start, min(start + BLOCK, C)) for start in range(0, C, BLOCK)]


def factor(A: torch.Tensor) -> Factor | None:
    """The factor of A (C, C), of which the lower triangle is read; None where it is not positive definite, or where
    its entries overflow."""
    if A.device.type != "cpu":
        L, info = torch.linalg.cholesky_ex(A)
        return None if info or not torch.isfinite(L.diagonal()).all() else Factor(L)
    L, failed = torch.zeros_like(A, memory_format=torch.contiguous_format), []
    made = Factor(L)
    for number, own in enumerate(made.panels):
        rows = slice(own.start, None)
        P = A[rows, own] if not number else torch.addmm(A[rows, own], L[rows, :own.start], L[own, :own.start].T,
                                                        alpha=-1)
        L[own, own], info = torch.linalg.cholesky_ex(P[:own.stop - own.start])
        failed.append(info)
        if own.stop < len(A):
            L[own.stop:, own] = P[own.stop - own.start:] @ made.inverse(number).T
    if (failed and torch.stack(failed).any()) or not torch.isfinite(L.diagonal()).all():  # LAPACK is silent about Inf
        return None
    return made
