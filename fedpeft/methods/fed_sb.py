"""Fed-SB: only an r x r matrix is trained and averaged (https://arxiv.org/abs/2502.15436)."""

from dataclasses import dataclass

from fedpeft.methods.parts.cores import Cores


@dataclass(frozen=True)
class FedSB(Cores):
    """W0 + B R A with B, A frozen: R, (r, r), and the head are shared, so the mean is exact.

    The paper takes B, A and R from the SVD of a first gradient of full fine-tuning. There is none
    before the rounds here: B and A are leading singular vectors of the weight (``init=svd``, as
    LoRA-XS's without the singular values) or random (``orthogonal``), and R starts at zero. As in
    the paper there is no alpha.
    """
