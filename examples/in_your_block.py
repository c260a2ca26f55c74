"""A memory in a transformer block that knows nothing of it: three lines, marked below.

The block is torch's own. It reads a page of facts, then is asked for them in another call, in which it sees nothing of
that page: what it answers it has from the memory alone. Runs in seconds: ``python examples/in_your_block.py``.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fwpkm import MemoryConfig
from fwpkm.layers import FwPKM

WORDS, FACTS, WIDTH = 64, 12, 64
PAGE = 2 * FACTS  # words on a page; the memory writes at its end


class Block(nn.TransformerEncoderLayer):
    def __init__(self) -> None:
        super().__init__(WIDTH, nhead=4, dim_feedforward=2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.memory = FwPKM(WIDTH, n_subkeys=16, key_dim=64, value_dim=64, config=MemoryConfig(chunk_size=PAGE))  # 1

    def forward(self, hidden: Tensor, state=None):
        read = self.memory(hidden, state)  # 2: read and write, going on from where the last call stopped
        mask = nn.Transformer.generate_square_subsequent_mask(hidden.shape[1])
        return super().forward(read.hidden, src_mask=mask, is_causal=True), read.state  # 3: hand the state on


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.block, self.head = nn.Embedding(WORDS, WIDTH), Block(), nn.Linear(WIDTH, WORDS)

    def forward(self, words: Tensor, state=None):
        hidden, state = self.block(self.embedding(words), state)
        return self.head(hidden), state


def draw(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pages of facts "key value key value ...", the keys in another order, and the value of each."""
    keys = torch.rand(batch, WORDS // 2).argsort(1)[:, :FACTS]
    values = torch.randint(WORDS // 2, WORDS, (batch, FACTS))
    order = torch.rand(batch, FACTS).argsort(1)
    return torch.stack((keys, values), 2).flatten(1), keys.gather(1, order), values.gather(1, order)


def main(steps: int = 60) -> float:
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(steps + 1):
        page, questions, answers = draw(batch=16)
        _, state = model(page)
        logits, _ = model(questions, state)
        loss = cross_entropy(logits.flatten(0, 1), answers.flatten())
        right = (logits.argmax(-1) == answers).float().mean().item()
        if step % 10 == 0:
            print(f"step {step:2}: loss {loss.item():.3f}, {right:6.1%} of the facts recalled")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return right


if __name__ == "__main__":
    main()
