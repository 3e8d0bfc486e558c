"""Texts as a condition: a small transformer over UTF-8 bytes, without a vocabulary to download."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sfumato.conditioners.conditioner import Condition
from sfumato.errors import UserError
from sfumato.nn.layers import Attention, FeedForward, norm
from sfumato.types import Cond, Items

BEGIN_TEXT, END_TEXT = 256, 257  # tokens after the 256 bytes
TEXT_INIT_STD = 0.02  # standard deviation of new embeddings of bytes and positions, as in BERT and GPT-2


def text_tokens(text: str, max_bytes: int) -> Tensor:
    """Begin, the UTF-8 bytes of the characters that fit in `max_bytes`, and end: (n,), int64."""
    cut = text.encode(errors="replace")[:max_bytes].decode(errors="ignore")
    return torch.tensor([BEGIN_TEXT, *cut.encode(), END_TEXT])


class TextBlock(nn.Module):
    """Attention among the bytes of a text, and feed-forward; both normalise their input.

    Args:
        width: Channels W.
        heads: Attention heads.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = Attention(width, heads)
        self.feed_forward = FeedForward(width)

    def forward(self, h: Tensor, mask: Tensor) -> Tensor:
        """Map tokens h (B, M, W); `mask` (B, M) is true where a text has a token."""
        h = h + self.attention(norm(h), mask=mask)
        return h + self.feed_forward(norm(h))


class TextCondition(Condition[Sequence[str | None]]):
    """A transformer encoder over the bytes of a text: a token per byte, a pooled vector, or both.

    The tokens are begin, the bytes, and end; the batch is padded to its longest text, and a text's tokens do not depend
    on the padding. The vector is a linear map of the mean over the tokens. The null is one learned token. An empty text
    is known: it has begin and end alone.

    Args:
        token_dim: Length of a token; 0 for none.
        dim: Length of the vector; 0 for none. Networks without attention to condition tokens take the vector alone.
        width: Channels W of the encoder.
        layers: Number of its blocks.
        heads: Attention heads; must split W in an even number of channels.
        max_bytes: Longest text in bytes; a longer one is cut between two characters.
        dropout: Share of training texts replaced by the null.

    Raises:
        UserError: `token_dim` and `dim` are both 0, or `heads` does not fit `width`.

    References:
        Bytes as tokens: Xue et al. 2022, ByT5, arXiv:2105.13626.
    """

    kind = "text"

    def __init__(
        self,
        token_dim: int = 128,
        dim: int = 0,
        *,
        width: int = 128,
        layers: int = 2,
        heads: int = 4,
        max_bytes: int = 256,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(dim, token_dim, dropout)
        if not token_dim and not dim:
            raise UserError("a text condition needs token_dim or dim above 0")
        if width % (2 * heads):
            raise UserError(f"width={width} must be a multiple of 2 * heads = {2 * heads}; change width or heads")
        self.max_bytes = max_bytes
        self.table = nn.Embedding(END_TEXT + 1, width)
        nn.init.normal_(self.table.weight, std=TEXT_INIT_STD)
        self.positions = nn.Parameter(TEXT_INIT_STD * torch.randn(max_bytes + 2, width))
        self.blocks = nn.ModuleList(TextBlock(width, heads) for _ in range(layers))
        self.null_token = nn.Parameter(torch.randn(width))
        self.tokens_out = nn.Linear(width, token_dim) if token_dim else None
        self.vector_out = nn.Linear(width, dim) if dim else None

    def known(self, values: Sequence[str | None]) -> Tensor:
        return torch.tensor([text is not None for text in values])

    def embed(self, values: Sequence[str | None]) -> Cond:
        """The tokens of B texts, (B, M, token_dim) with mask (B, M), and their vectors (B, dim)."""
        index, mask = Items(text_tokens(text or "", self.max_bytes) for text in values).pad()  # (B, M)
        assert mask is not None, "a list of items is padded with a mask"
        index, mask = index.to(self.positions.device), mask.to(self.positions.device)
        h = self.table(index) + self.positions[: index.shape[1]]  # (B, M, W)
        for block in self.blocks:
            h = block(h, mask)
        return self._project(norm(h), mask)

    def null(self, count: int) -> Cond:
        h = self.null_token.expand(count, 1, -1)  # (B, 1, W)
        return self._project(h, torch.ones(count, 1, dtype=torch.bool, device=h.device))

    def _project(self, h: Tensor, mask: Tensor) -> Cond:
        """Tokens and vectors of encoded texts h (B, M, W); tokens are zero where `mask` (B, M) is false."""
        there = mask[..., None]
        tokens = None if self.tokens_out is None else torch.where(there, self.tokens_out(h), 0)
        mean = torch.where(there, h, 0).sum(1) / there.sum(1)  # (B, W)
        vector = None if self.vector_out is None else self.vector_out(mean)
        return Cond(vector=vector, tokens=tokens, mask=None if tokens is None else mask)
