"""Which training sentences taught a tiny GPT-2 what it knows?

The corpus is made here: forty people, each in three sentences that say in which town they live and which animal they keep, and every
other one in a fourth form too. The network is then asked about the rest in that form. The influence of training sentence m on question q
is g_q . (G^T G / M + damping)^-1 . g_m (Koh and Liang 2017, arXiv:1703.04730; Park et al. 2023,
arXiv:2303.14186). The right answer is known: the person's own three sentences. And it is tried: without the sentences that were found
the network is trained again, and does not know.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from training import arguments
from transformers import GPT2Config, GPT2LMHeadModel

import partials as pt

NAMES = [
    "ada",
    "ben",
    "cleo",
    "dov",
    "eva",
    "finn",
    "gwen",
    "hugo",
    "iris",
    "joel",
    "kira",
    "leon",
    "mira",
    "noel",
    "opal",
    "piet",
    "quin",
    "rosa",
    "seth",
    "tara",
    "umar",
    "vera",
    "walt",
    "xena",
    "yuri",
    "zora",
    "alba",
    "bram",
    "cora",
    "dirk",
    "elsa",
    "fred",
    "gina",
    "hans",
    "ines",
    "jens",
    "katy",
    "lars",
    "maud",
    "nina",
]
TOWNS = ["arden", "brill", "corum", "dover", "esker", "fargo", "gomel", "hamar"]
ANIMALS = ["goat", "cat", "dog", "owl", "hen", "crow", "pony", "toad"]
TAUGHT = ("{name} from {town} keeps a {animal} .", "{name} lives in {town} with one {animal} .", "{name} feeds the {animal} of {town} .")
ASKED = "{name} walks a {animal} through {town} ."
DAMPING = 3e-4
"""Over the mean square of the gradients."""


def corpus() -> tuple[list[str], list[str]]:
    """The training sentences, three in a row of each person and then the fourth forms, and the questions about the rest."""
    facts = [{"name": name, "town": TOWNS[n % 8], "animal": ANIMALS[(n // 8 + 3 * n) % 8]} for n, name in enumerate(NAMES)]
    taught = [form.format(**fact) for fact in facts for form in TAUGHT]
    return taught + [ASKED.format(**fact) for fact in facts[::2]], [ASKED.format(**fact) for fact in facts[1::2]]


def tokens(sentences: list[str], words: dict[str, int]) -> Tensor:
    """(N, T) of word numbers, zeros behind the end."""
    rows = [[words[word] for word in sentence.split()] for sentence in sentences]
    longest = max(map(len, rows))
    return torch.tensor([row + [0] * (longest - len(row)) for row in rows])


def surprise(logits: Tensor, sentence: Tensor) -> Tensor:
    """The mean over words of -log p(word | the words before it): one number for one sentence, (1, T, V) and (1, T)."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), sentence[:, 1:].flatten(), ignore_index=0)


def learnt(data: Tensor, vocabulary: int, steps: int) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 16, "resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
    net = GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, bos_token_id=0, eos_token_id=0, **sizes))
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        surprise(net(data).logits, data).backward()
        optimizer.step()
    return net


def answer(logits: Tensor, question: Tensor) -> Tensor:
    """The mean of -log p over the animal and the town of questions, given the name before them."""
    return F.cross_entropy(logits[:, [2, 4]].flatten(0, 1), question[:, [3, 5]].flatten())


def influences(net: GPT2LMHeadModel, data: Tensor, questions: Tensor) -> Tensor:
    """(questions, sentences): from inner products of gradients alone, since (G^T G / M + d)^-1 G^T = G^T (G G^T / M + d)^-1."""
    G = pt.gradient(net, data, data, loss=surprise, output="logits")
    asked = pt.gradient(net, questions, questions, loss=answer, output="logits")
    kernel = G.gram().double()
    damping = DAMPING * kernel.diagonal().mean() * torch.eye(len(data), dtype=torch.float64)
    return asked.gram(G).double() @ torch.linalg.inv(kernel / len(data) + damping)


def main() -> None:
    options = arguments(__doc__, 150, "influential_sentences.png")
    taught, questions = corpus()
    words = {word: n for n, word in enumerate(sorted({word for line in taught + questions for word in line.split()}), 1)}
    data, probes = tokens(taught, words), tokens(questions, words)
    net = learnt(data, len(words) + 1, options.steps)

    influence = influences(net, data, probes)
    top = influence.argsort(dim=1, descending=True)
    person = 2 * torch.arange(len(probes)) + 1
    own = (top[:, :3] // 3 == person[:, None]).double().mean()
    print(f"{own:.0%} of the three most influential sentences are about the person who is asked about (by chance {3 / len(data):.1%})")
    for n in (0, 8):
        print(f"  asked: {questions[n]}\n" + "\n".join(f"    {influence[n, m]:9.3g}  {taught[m]}" for m in top[n, :4]))

    chosen = torch.arange(0, len(probes), 4)
    without = torch.ones(len(data), dtype=torch.bool)
    without[top[chosen, :3].flatten()] = False
    random = torch.ones(len(data), dtype=torch.bool)
    random[torch.randperm(len(data), generator=torch.Generator().manual_seed(1))[: int((~without).sum())]] = False
    nets = [net, *(learnt(data[kept], len(words) + 1, options.steps) for kept in (without, random))]
    with torch.no_grad():
        before, *again = (float(answer(one(probes[chosen]).logits, probes[chosen])) for one in nets)
    print(
        f"surprise at town and animal of {len(chosen)} people: {before:.2f} as trained, {again[0]:.2f} without the sentences found, ",
        end="",
    )
    print(f"{again[1]:.2f} without as many others")
    draw(options.picture, influence, [before, *again])


def draw(path: str, influence: Tensor, surprises: list[float]) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2), width_ratios=(2.1, 1), layout="constrained")
    shown = left.imshow(influence / influence.abs().amax(1, True), aspect="auto", cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    left.set(
        xlabel="training sentence: three of each person, then the fourth form",
        ylabel="person asked about",
        title="influence, over the largest of its row",
    )
    figure.colorbar(shown, ax=left)
    right.bar(["as trained", "without\nthose found", "without as\nmany others"], surprises)
    right.set_title("surprise at town and animal")
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"picture: {path}")


if __name__ == "__main__":
    main()
