"""What the examples train: a small Transformer over bytes, and text that every machine has. Plain PyTorch."""

import sysconfig
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset


class ByteTransformer(nn.Module):
    """Reads bytes, of shape (batch, time); returns the logits of each next byte, of shape (batch * time, 256)."""

    def __init__(self, *, width: int = 128, layers: int = 4, heads: int = 4, context: int = 128) -> None:
        super().__init__()
        self.context = context
        self.token = nn.Embedding(256, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.1, batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        time = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(time, device=tokens.device)
        x = self.token(tokens) + self.position(torch.arange(time, device=tokens.device))
        for block in self.blocks:
            x = block(x, src_mask=mask, is_causal=True)
        return self.head(self.norm(x).flatten(0, 1))

    def loss(self, text: Tensor) -> Tensor:
        """The mean cross-entropy of every byte of ``text``, (batch, time + 1), given those before it."""
        return nn.functional.cross_entropy(self(text[:, :-1]), text[:, 1:].flatten())

    @torch.no_grad()
    def generate(self, prompt: str, length: int) -> str:
        """Returns ``prompt`` with ``length`` more bytes, drawn from the distribution that the model has learned."""
        tokens = torch.tensor([list(prompt.encode())])
        for _ in range(length):
            logits = self(tokens[:, -self.context :])[-1]
            drawn = torch.multinomial(torch.softmax(logits / 0.7, -1), 1)
            tokens = torch.cat([tokens, drawn[None]], 1)
        return bytes(tokens[0].tolist()).decode(errors="replace")


class PythonSources(Dataset[tuple[int, Tensor]]):
    """Pieces of Python's own standard library, each with its index.

    Every time a sample is read it starts at another byte, chosen at random: an augmentation, which a resumed run has to
    repeat to the byte.
    """

    def __init__(self, samples: int, *, context: int = 128) -> None:
        files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        text = b"".join(file.read_bytes() for file in files)[: (samples + 2) * context]
        if len(text) < (samples + 2) * context:
            raise ValueError(f"{samples} samples are more than the {len(files)} files of the standard library hold.")
        self.text, self.samples, self.context = torch.frombuffer(bytearray(text), dtype=torch.uint8), samples, context

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        start = index * self.context + int(torch.randint(self.context, ()))
        return index, self.text[start : start + self.context + 1].long()
