"""ContextCLIP: context-aware multimodal pretraining, small enough to read in one sitting.

An open reimplementation of Roth, Akata, Damen, Balažević, Hénaff, "Context-Aware Multimodal
Pretraining", CVPR 2025 (arXiv 2411.15099). First the method, 1 contrastive losses, 2 context, 3
model, 4 training. Then the data, 5 cards that are drawn here, 6 captions and images of your
own, and 7 files and the command line. `python contextclip.py --help` lists every setting.
"""

import argparse
import contextlib
import csv
import inspect
import io
import json
import math
import os
import re
import sys
import time
import unicodedata
import zlib
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, fields, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import get_data_path
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torchvision import datasets, models, transforms
from tqdm import tqdm
from tqdm.contrib.concurrent import thread_map

RANK, PROCESSES = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun's


class UserError(ValueError):
    """A mistake of the user's: the command line prints it as one line and exits with status 2."""


OBJECTIVES = ["clip", "siglip", "clixp", "siglixp"]
CHOICES = {"objective": OBJECTIVES, "precision": ["auto", "float32", "bf16"]}
RANGES = {
    "image_size": (32, 512), "seed": (0, 2**63 - 1), "steps": (1, 10**9), "batch_size": (2, 2**17),
    "lr": (0, 10), "weight_decay": (0, 10), "width": (8, 8192), "alpha": (0, 1), "tau": (1, 100),
    "tau_ctx": (0.02, 2), "number_share": (0, 1), "characters": (0, 10**6), "chunk": (0, 10**6),
}  # fmt: skip


@dataclass
class Settings:
    """What determines a run, --init and processes aside; fields are flags, their comments help."""

    objective: str = "clip"  # clip, siglip, with context clixp, siglixp; the flag takes some: a,b
    data: str = ""  # your own images and captions, a folder or a table; else cards
    image_size: int = 32  # pixels that the encoder gets, both ways
    encoder: str = "cnn"  # of images: cnn, or any classification model of torchvision
    pretrained: bool = False  # start from torchvision's weights for that encoder (downloads them)
    seed: int = 0  # of the initial weights and of every batch
    steps: int = 3200  # optimiser steps
    batch_size: int = 512  # B; the other B - 1 images are an image's context
    lr: float = 2e-3  # peak learning rate of AdamW, between a linear warm-up and a cosine to 0
    weight_decay: float = 0.1  # of matrices; temperatures, biases and gains have none
    width: int = 64  # d, of the embeddings and the encoders
    alpha: float = 0.9  # weight of the plain loss; the context loss has 1 - alpha
    tau: float = 5.0  # start of tau_1, tau_2, which multiply cosines; CLIP: 1 / 0.07, SigLIP: 10
    tau_ctx: float = 0.25  # start of the divisor tau_ctx sqrt(d) as a whole; the log has tau_ctx
    number_share: float = 1.0  # share of captions that name the card's number
    characters: int = 0  # how many to train on, 0 for all
    precision: str = "auto"  # of the image encoder: auto, float32, bf16 (losses: float32, TF32)
    chunk: int = 0  # losses, attention by so many rows: memory grows as B x chunk; 0: all at once
    no_mask: bool = False  # ablation: an image may attend to itself
    shared_temperature: bool = False  # ablation: tau_1 (and b_1) serve the context loss too
    detach_values: bool = False  # ablation: no gradient into the values V
    normalize_values: bool = False  # ablation: normalised values V

    sigmoid = property(lambda self: self.objective.startswith("sig"))
    context = property(lambda self: self.objective.endswith("xp"))

    def __post_init__(self):
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise UserError(f"--{name} {getattr(self, name)}: it is one of {choices}")
        for name, (low, high) in RANGES.items():
            if not low <= getattr(self, name) <= high:
                flag, value = name.replace("_", "-"), getattr(self, name)
                raise UserError(f"--{flag} {value}: it lies between {low} and {high}")


# ---- 1. Contrastive losses -----------------------------------------------------------------------
# x, t (n, d): normalised image and text embeddings of n of the batch's B pairs, of all but where
# several processes or blocks (--chunk) share the batch; X, T (B, d): those of all B; row r of x is
# row i[r] of X. The result (n,) is a term per pair, in nats; the loss L is their mean. The softmax
# ignores the bias b, the sigmoid t and X.


def clip_loss(x, t, i, X, T, tau, b=None):
    """Softmax contrastive loss, InfoNCE (Radford et al. 2021): logits s_ij = tau x_i.t_j, the mean
    of the cross-entropies of image to text and of text to image, where j = i is right."""
    image_to_text = F.cross_entropy(tau * x @ T.T, i, reduction="none")
    text_to_image = F.cross_entropy(tau * t @ X.T, i, reduction="none")
    return (image_to_text + text_to_image) / 2


def siglip_loss(x, t, i, X, T, tau, b):
    """Sigmoid contrastive loss (Zhai et al. 2023): -sum_j log sigmoid(z_ij s_ij), logits
    s_ij = tau x_i.t_j + b, labels z_ij = 1 where j = i and else -1."""
    s = tau * x @ T.T + b
    z = 2 * F.one_hot(i, len(T)) - 1
    return -F.logsigmoid(z * s).sum(dim=1)


# ---- 2. Context ----------------------------------------------------------------------------------


def attention(x, i, K, tau_ctx, mask=True):
    """softmax_j( x_i.K_j / (tau_ctx sqrt(d)) ): how much of image j goes into the context of i.
    x (n, d) normalised, at the places i (n,) of the batch; keys K (B, d), the batch's normalised
    embeddings -> (n, B), each row with sum 1; with `mask` its entry j = i is 0."""
    scores = x @ K.T / (tau_ctx * x.shape[1] ** 0.5)
    if mask:
        scores = scores.scatter(1, i[:, None], -math.inf)
    return scores.softmax(dim=1)


def contextualize(x, i, K, V, tau_ctx, mask=True):
    """x_ctx_i = softmax_j( x_i.K_j / (tau_ctx sqrt(d)) ) V: an image rebuilt from the others.
    Values V (B, d) are the batch's raw embeddings, not normalised; nor is x_ctx (n, d)."""
    return attention(x, i, K, tau_ctx, mask) @ V


def lixp_loss(v, u, temperatures, settings):
    """L_LIxP = alpha L(X, T; tau_1) + (1 - alpha) L(X_ctx, T; tau_2); plainly L(X, T; tau_1) alone.
    v, u (n, d): x, t before they are normalised; temperatures (5,) of `ContextCLIP`. Gradients flow
    through queries, keys and values. Returns (3,) nats: the loss, its plain, its context term."""
    x, t = F.normalize(v, dim=1), F.normalize(u, dim=1)
    X, T, V = gather(x), gather(t), gather(v)  # of all processes; with one they stay as they are
    i = torch.arange(len(x), device=x.device) + len(x) * RANK
    tau_1, tau_2, tau_ctx, b_1, b_2 = temperatures
    loss = siglip_loss if settings.sigmoid else clip_loss
    blockwise = partial(in_blocks, settings.chunk)

    plain = blockwise(loss, (x, t, i), X, T, tau_1, b_1).mean()
    if not settings.context:
        return torch.stack((plain, plain, 0 * plain))

    if settings.shared_temperature:
        tau_2, b_2 = tau_1, b_1
    if settings.normalize_values:
        V = X
    if settings.detach_values:
        V = V.detach()
    x_ctx = blockwise(contextualize, (x, i), X, V, tau_ctx, not settings.no_mask)
    x_ctx = F.normalize(x_ctx, dim=1)  # our reading: L compares directions, as everywhere
    context = blockwise(loss, (x_ctx, t, i), gather(x_ctx), T, tau_2, b_2).mean()
    return torch.stack((settings.alpha * plain + (1 - settings.alpha) * context, plain, context))


def in_blocks(chunk, function, rows, *whole):
    """function(*rows, *whole): a result for each row of the tensors `rows`. With `chunk` these are
    cut into blocks, each computed again in the backward pass: no B x B matrix is kept."""
    if not chunk:
        return function(*rows, *whole)
    blocks = zip(*(tensor.split(chunk) for tensor in rows), strict=True)
    return torch.cat([checkpoint(function, *b, *whole, use_reentrant=False) for b in blocks])


def gather(x):
    """Rows of one process -> rows of all, by rank; gradients come back from all."""
    if PROCESSES == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(PROCESSES)]
    dist.all_gather(parts, x.detach().contiguous())
    parts[RANK] = x  # the one with a gradient; what others' losses add to it, the hook fetches
    everyone = torch.cat(parts)
    if everyone.requires_grad:
        everyone.register_hook(add_up)
    return everyone


def add_up(x):
    """The sum over the processes."""
    x = x.contiguous().clone()
    if PROCESSES > 1:
        dist.all_reduce(x)
    return x


# ---- 3. Model ------------------------------------------------------------------------------------


def cnn(channels, size, width):
    """(B, channels, size, size) -> (B, d). No batch norm: an embedding depends on its image alone,
    context enters by the loss. No pooling: it would lose where on the card a digit stands."""
    inputs, side = width // 2, (size + 3) // 4  # of a card 8: halved until it is 4
    layers, plan = [nn.Conv2d(channels, inputs, 7, 4, padding=3)], [(inputs, 1)]  # channels, stride
    while side > 4:
        plan += [(width, 2), (width, 1)]
        side = (side + 1) // 2
    for outputs, stride in plan:
        layers += [nn.GroupNorm(1, inputs), nn.ReLU(True), nn.Conv2d(inputs, outputs, 3, stride, 1)]
        inputs = outputs
    layers += [nn.GroupNorm(1, inputs), nn.ReLU(True), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(inputs * side**2, width))


def torchvision_encoder(name, pretrained, size, width):
    """(B, 3, size, size) -> (B, d): a linear layer on the 1,000 outputs of a classifier. Raises
    UserError if torchvision has none of that name, or it takes no images of that size."""
    with blame(f"--encoder {name}, {size} pixels"):
        if name not in models.list_models(models):
            raise ValueError("torchvision has no classification model of that name")
        of_size = {"image_size": size} if name.startswith("vit") else {}
        model = models.get_model(name, weights="DEFAULT" if pretrained else None, **of_size)
        for part in ("aux1", "aux2", "AuxLogits", "aux_logits", "transform_input"):
            setattr(model, part, None)  # GoogLeNet's and Inception's further outputs, and a scaling
        model = nn.Sequential(model, nn.Linear(1000, width)).eval()
        model(torch.zeros(1, 3, size, size))
        return model.train()


class TextEncoder(nn.Module):
    """tokens (B, L) -> (B, d): the words' embeddings with their places, pooled by attention: a head
    weighs words and places as it has learned to. A caption is a weighted sum of its words, no more,
    so that names never seen, of words that were, still find their image."""

    def __init__(self, vocabulary_size, width, heads=8):
        super().__init__()
        self.words = nn.Embedding(vocabulary_size, width, padding_idx=0)
        self.places = nn.Parameter(0.02 * torch.randn(MAX_WORDS, width))
        self.norm = nn.LayerNorm(width)
        self.attention = nn.Linear(width, heads)
        self.out = nn.Linear(heads * width, width)

    def forward(self, tokens):
        h = self.norm(self.words(tokens) + self.places[: tokens.shape[1]])  # (B, L, d)
        scores = self.attention(h).masked_fill(tokens[..., None] == 0, -math.inf)  # (B, L, heads)
        return self.out((scores.softmax(dim=1).mT @ h).flatten(1))  # of (B, heads, d)


def use_bf16(precision, device):
    """Whether the image encoder runs in bf16: "auto" means where the hardware multiplies it."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    features = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return bool(features.get("avx512_bf16") or features.get("amx_bf16"))


class ContextCLIP(nn.Module):
    """The two encoders, and the temperatures and biases of the losses. Every objective has the same
    parameters, drawn in the same order: one seed, one start."""

    def __init__(self, settings, vocabulary):
        super().__init__()
        self.settings, self.vocabulary = settings, vocabulary
        size, d = settings.image_size, settings.width
        self.channels = 1 if settings.encoder == "cnn" and not settings.data else 3
        if settings.encoder == "cnn":
            self.image_encoder = cnn(self.channels, size, d)
        else:
            self.image_encoder = torchvision_encoder(settings.encoder, settings.pretrained, size, d)
        self.text_encoder = TextEncoder(len(vocabulary), d)
        taus = [settings.tau, settings.tau, settings.tau_ctx / d**0.5]  # the setting has sqrt(d)
        self.log_tau = nn.Parameter(torch.tensor(taus).log())
        b = -math.log(settings.batch_size - 1)  # sigmoid(b) = 1 / B, the share of right pairs
        self.b = nn.Parameter(torch.full((2,), b))

    def temperatures(self):
        """tau_1, tau_2, tau_ctx and the biases b_1, b_2: (5,), for those unused to have gradients
        of 0, which DistributedDataParallel needs."""
        return torch.cat((self.log_tau.exp(), self.b))

    def encode_image(self, images, normalize=False):
        """images (B, 1 or 3, S, S) in about [0, 1], of another size resized; the cnn of cards takes
        one channel -> v (B, d) float32, with `normalize` of length 1."""
        images = transforms.functional.resize(images, [self.settings.image_size] * 2)
        images = images.expand(-1, self.channels, -1, -1).clone(memory_format=torch.channels_last)
        images.mul_(4).sub_(2)  # mean 0, deviation about 1
        bf16 = use_bf16(self.settings.precision, images.device)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
            v = self.image_encoder(images).float()
        return F.normalize(v, dim=1) if normalize else v

    def encode_text(self, tokens, normalize=False):
        """tokens (B, L) of `tokenize` -> t (B, d) float32, with `normalize` of length 1."""
        t = self.text_encoder(tokens)
        return F.normalize(t, dim=1) if normalize else t

    def forward(self, images, tokens):
        """images (B, 1 or 3, S, S), tokens (B, L) -> the three terms of `lixp_loss`."""
        v, u = self.encode_image(images), self.encode_text(tokens)
        return lixp_loss(v, u, self.temperatures(), self.settings)


MAX_WORDS = 32  # of a caption; more are cut off
NO_SPACES = "([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff])"  # Thai to kanji
NUMERALS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def split_words(caption):
    """Words of letters, marks, digits and hyphens; scripts without spaces go by character."""
    text = re.sub(NO_SPACES, r" \1 ", unicodedata.normalize("NFC", caption.lower()))
    kept = [c if c == "-" or unicodedata.category(c)[0] in "LMN" else " " for c in text]
    return "".join(kept).split()


def build_vocabulary(captions, least=1):
    """{word: token} of words that come `least` times; 0 is padding, 1 any other word."""
    counts = Counter(word for caption in captions for word in split_words(caption))
    words = sorted(word for word in counts if counts[word] >= least)
    return {word: token for token, word in enumerate(["<pad>", "<unk>", *words])}


def tokenize(captions, vocabulary):
    """N captions -> tokens (N, L) int64, L the longest; an empty caption is an unknown word."""
    words = [split_words(caption)[:MAX_WORDS] or ["<unk>"] for caption in captions]
    rows = [torch.tensor([vocabulary.get(word, 1) for word in row]) for row in words]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)


def embed_images(model, images):
    """images (N, 1 or 3, S, S) -> x (N, d) normalised, in parts that fit in memory."""
    return torch.cat([model.encode_image(part, normalize=True) for part in images.split(1024)])


def embed_classes(model, captions):
    """C lists of captions -> T (C, d) normalised, the mean of each. Models of cards get a caption
    with ten endings, as in training number_share of them a number; of ten numbers each digit stands
    once in each place."""
    share = 0 if model.settings.data else model.settings.number_share
    ends = [""] * (1 if model.settings.data else 10)
    for i in range(round(10 * share)):
        ends[i] = ", number " + " ".join(NUMERALS[(i + shift) % 10] for shift in (0, 3, 6))
    T = []
    for texts in captions:
        tokens = tokenize([text + end for text in texts for end in ends], model.vocabulary)
        T.append(model.encode_text(tokens.to(model.b.device), normalize=True).mean(0))
    return F.normalize(torch.stack(T), dim=1)


def prototypes(support, labels, classes):
    """Class means, normalised again: (..., N, d) normalised, labels (N,) -> P (..., classes, d)."""
    return F.normalize(F.one_hot(labels, classes).to(support).T @ support, dim=-1)


# ---- 4. Training ---------------------------------------------------------------------------------

LOG_EVERY, SAVE_EVERY = 10, 100  # steps; the loop waits for the device only to log
COLUMNS = ["step", "loss", "plain_loss", "context_loss", "tau_1", "tau_2", "tau_ctx", "b_1", "b_2"]


def seed_step(settings, step):
    """All that is random in a step follows from the seed, the step and the process: nothing has to
    be saved for a resumed run to be the same, and two objectives see the same batches."""
    sequence = np.random.SeedSequence([settings.seed, step, RANK])
    torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))


def learning_rate(step, settings):
    """The smaller of a linear warm-up over a twentieth of the steps and a cosine to 0."""
    warmup = step / max(1, settings.steps // 20)
    return settings.lr * min(warmup, (1 + math.cos(math.pi * (step - 1) / settings.steps)) / 2)


def start(settings, data, init, saved, compile):
    """A model, its form for several processes and its optimiser: new, or of a checkpoint's content,
    the weights of `init` (post-training), or all of `saved` (to go on). Raises UserError."""
    torch.manual_seed(settings.seed)
    model = ContextCLIP(settings, data.vocabulary)
    content = saved or init
    if content and content["vocabulary"] != list(data.vocabulary):
        raise UserError("--init, --resume: the checkpoint has another vocabulary")
    if content:
        with blame("--init, --resume: the checkpoint does not fit"):
            model.load_state_dict(content["model"])
    if init and not saved and not init["settings"]["objective"].endswith("xp"):
        # a base has not learned tau_2 and b_2: they copy tau_1 and b_1; tau_ctx starts anew
        model.log_tau.data[1] = model.log_tau.data[0]
        model.log_tau.data[2] = math.log(settings.tau_ctx / settings.width**0.5)
        model.b.data[1] = model.b.data[0]
    if PROCESSES > 1 and data.device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.to(data.device, memory_format=torch.channels_last)
    if compile:
        torch._dynamo.config.suppress_errors = True  # without a compiler it goes on plainly
        model.image_encoder.compile()
        model.text_encoder.compile()
    matrices = {"params": [p for p in model.parameters() if p.ndim >= 2]}
    others = {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}
    options = {"betas": (0.9, 0.98), "weight_decay": settings.weight_decay, "fused": True}
    optimizer = torch.optim.AdamW([matrices, others], settings.lr, **options)
    if saved:
        optimizer.load_state_dict(saved["optimizer"])
    forward = DistributedDataParallel(model) if PROCESSES > 1 else model
    return model, forward, optimizer


def train(settings, data, out, resume=False, init=None, compile=False, watch=None):
    """Train one model on the device of `data`, Cards or Photos, from the weights of `init` (a
    checkpoint's content) if given; write out/<objective>.pt and .csv; call `watch(step, model)` at
    every line of the log. Returns the row of the final table. Raises UserError."""
    path, steps, B = out / f"{settings.objective}.pt", settings.steps, settings.batch_size
    saved = read_checkpoint(path) if resume and path.exists() else None
    if saved:
        check_resumable(path, saved, settings, data)
    if saved and saved["result"] and saved["settings"]["steps"] == steps:
        return saved["result"]
    model, forward, optimizer = start(settings, data, init, saved, compile)
    log, seconds = (saved["log"], saved["seconds"]) if saved else ([], 0.0)
    logged = log[-1][0] if log else 0
    total, begin = 0, time.perf_counter()
    chance = math.log(B) + (1 if settings.sigmoid else 0)  # about, all cosines 0 (1: wrong pairs)
    print(f"{settings.objective}: {data.device}, {data.about}; loss at chance {chance:.2f}")
    remaining = range(logged + 1, steps + 1)
    bar = tqdm(remaining, settings.objective, steps, initial=logged, disable=RANK > 0 or None)
    for step in bar:
        seed_step(settings, step)
        images, tokens = data.draw_batch(settings, step)
        losses = forward(images, tokens)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings)
        optimizer.zero_grad()
        losses[0].backward()
        optimizer.step()
        model.log_tau.data[:2].clamp_(0, math.log(100))  # tau_1, tau_2 in 1 to 100

        total = total + losses.detach() / PROCESSES
        if step % LOG_EVERY == 0 or step == steps:
            norm = nn.utils.get_total_norm(model.parameters())  # of the weights: are all finite?
            mean = add_up(total) / (step - logged)
            line = torch.cat((mean, model.temperatures(), norm[None])).tolist()
            if not math.isfinite(sum(line)):
                raise UserError(f"not finite at step {step}, {path} is not touched; a lower --lr?")
            if logged < steps / 10 <= step and steps >= 100 and line[1] > 0.98 * chance:
                bar.write(f"warning: at step {step} the loss is still at chance, {line[1]:.3f}")
            bar.set_postfix(loss=line[0])
            seconds += time.perf_counter() - begin
            log.append([step, *line[:-1]])
            if watch:
                watch(step, model)
            if step % SAVE_EVERY == 0 and step < steps:
                save(path, model, optimizer, data, log, seconds)
            total, logged, begin = 0, step, time.perf_counter()
    result = {"objective": settings.objective, "loss": line[0], **data.validate(model.eval())}
    result |= {"seconds": seconds, "images/s": steps * B / seconds}
    save(path, model, optimizer, data, log, seconds, result)
    return result


# ---- 5. Cards ------------------------------------------------------------------------------------

FACES = [  # typefaces that come with matplotlib, in the order that FACE_SPLITS cuts
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSansMono-Bold",
    "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique", "DejaVuSerif", "DejaVuSerif-Bold",
    "DejaVuSerif-Italic", "DejaVuSans-BoldOblique", "DejaVuSerif-BoldItalic",
    "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta",
]  # fmt: skip
FACE_SPLITS = {"train": slice(0, 10), "validation": slice(10, 12), "test": slice(12, 16)}
SPLITS = {  # the first pattern with which "é latin small letter e ..." begins; else it is for tests
    "phonetic letters": "[\u0250-\u02af]", "modifier letters": "[\u02b0-\u02ff]",
    "old italic": "[\U00010300-\U0001032f]",
    "train": ". digit|. latin (capital|small) letter .$|"
    r". greek (capital|small) letter \w+$|[\u2190-\u21cf\u2200-\u223f]",
}  # fmt: skip
SIZE = 32  # of a card in pixels, both ways


def split_of(character, name):
    """ "train", "test", or a validation task. Of the Latin letters with a diacritic one in ten
    validates and two test, by a checksum, a capital and its small letter together."""
    if re.fullmatch("latin (capital|small) letter [a-z] with .+", name):
        tenth = zlib.crc32(re.sub("capital|small", "", name).encode()) % 10
        return "combinations" if tenth == 0 else "test" if tenth < 3 else "train"
    found = (split for split, start in SPLITS.items() if re.match(start, f"{character} {name}"))
    return next(found, "test")


def render(text, font, height, width):
    """A bitmap (height, width) uint8 of a text, its ink in the middle."""
    canvas = Image.new("L", (width, height))
    left, top, right, bottom = font.getbbox(text)
    corner = ((width - left - right) // 2, (height - top - bottom) // 2)
    ImageDraw.Draw(canvas).text(corner, text, fill=255, font=font)
    return np.array(canvas)


def draw_typefaces():
    """The characters that at least four of the typefaces have, without marks and spaces; bitmaps
    uint8 of them, glyphs (N, 16, 32, 32), and of the ten digits of a plate (10, 16, 9, 8)."""
    paths = [f"{get_data_path()}/fonts/ttf/{name}.ttf" for name in FACES]
    charmaps = [FT2Font(path).get_charmap() for path in paths]
    load = partial(ImageFont.truetype, layout_engine=ImageFont.Layout.BASIC)  # no libraqm
    counts = Counter(chr(code) for charmap in charmaps for code in charmap)
    characters = sorted(c for c in counts if counts[c] >= 4)
    characters = [c for c in characters if unicodedata.category(c)[0] not in "CMZ"]
    glyphs = np.zeros((len(characters), len(FACES), SIZE, SIZE), np.uint8)
    fonts = [load(path, 22) for path in paths]
    for i, c in enumerate(tqdm(characters, "drawing glyphs", leave=False, disable=None)):
        for face, font in enumerate(fonts):
            if ord(c) in charmaps[face]:
                glyphs[i, face] = render(c, font, SIZE, SIZE)
    fonts = [load(path, 12) for path in paths]
    digits = np.stack([[render(c, font, 9, 8) for font in fonts] for c in "0123456789"])
    return characters, glyphs, digits


class Cards:
    """The N characters of `draw_typefaces`, its glyphs, digits: index {character: row}, names and
    splits (N,), drawn (N, 16): which glyphs there are; train: rows of characters, validation {task:
    rows}; tokens (N, L + 4) of the names, with room for a card's number."""

    def __init__(self, device, settings):
        self.device = torch.device(device)
        self.number_share = settings.number_share
        characters, glyphs, digits = draw_typefaces()
        self.index = {character: i for i, character in enumerate(characters)}
        self.names = [unicodedata.name(character).lower() for character in characters]
        self.fingerprint = zlib.crc32(glyphs)
        self.glyphs = torch.from_numpy(glyphs).to(device)
        self.digits = torch.from_numpy(digits).to(device)
        self.drawn = self.glyphs.amax((2, 3)) > 64  # some typefaces have it, and draw nothing
        # to train on: plain characters before combinations; to validate on: 40 of a task at most,
        # combinations only of words that are trained
        splits = {split: [] for split in ["combinations", *SPLITS]}
        self.splits = [split_of(c, name) for c, name in zip(characters, self.names, strict=True)]
        for i, split in enumerate(self.splits):
            group = "train" if split == "train" else "validation"
            if split in splits and self.drawn[i, FACE_SPLITS[group]].any():
                splits[split].append(i)
        train = splits.pop("train")
        train.sort(key=lambda i: (" with " in self.names[i], zlib.crc32(self.names[i].encode())))
        train = train[: settings.characters or None]
        self.train = torch.tensor(train, device=device)
        trained = [self.names[i] for i in train]
        self.vocabulary = build_vocabulary([*trained, *NUMERALS, "number"])
        splits["combinations"] = [i for i in splits["combinations"] if self.knows(i)]
        self.validation = {s: torch.tensor(m[:40]).to(device) for s, m in splits.items() if m}
        self.tokens = F.pad(tokenize(self.names, self.vocabulary), (0, 4)).to(device)
        self.longest = int((self.tokens[self.train] != 0).sum(1).max()) + 4  # of training captions
        self.numerals = torch.tensor([self.vocabulary[w] for w in NUMERALS], device=device)
        self.about = f"{len(self.train)} characters, {len(self.vocabulary)} words"

    def knows(self, character):
        """Whether all words of its name were trained."""
        return self.vocabulary.keys() >= {*split_words(self.names[character])}

    def draw_batch(self, settings, step):
        """This process's part of a batch, from the random state: images (B, 1, 32, 32) and tokens
        (B, L), of "latin small letter a, number four seven one" for example."""
        B, device = settings.batch_size // PROCESSES, self.device
        characters = self.train[torch.randint(len(self.train), (B,), device=device)]
        images, numbers = draw_cards(self, characters, "train")
        number = F.pad(self.numerals[numbers], (1, 0), value=self.vocabulary["number"])  # (B, 4)
        named = torch.rand(B, 1, device=device) < self.number_share
        tokens = self.tokens[characters, : self.longest]
        end = (tokens != 0).sum(1, keepdim=True) + torch.arange(4, device=device)
        return images, tokens.scatter(1, end, number * named)

    @torch.no_grad()
    def validate(self, model, shots=(1, 4, 16), queries=32):
        """Accuracy in percent on the validation tasks, cards of characters and typefaces neither
        trained nor tested: prototypes of k images per class, mean over the tasks, and zero-shot on
        the combinations (other names have unknown words). Supports are nested, queries the same."""
        torch.manual_seed(0)
        found = {}
        for task, members in self.validation.items():
            C = len(members)
            labels = torch.arange(C, device=self.device)
            images, _ = draw_cards(self, members.repeat(queries + max(shots)), "validation")
            query, support = embed_images(model, images).split([queries * C, max(shots) * C])
            classes = {}
            if task == "combinations":
                classes["zero-shot"] = embed_classes(model, [[self.names[i]] for i in members])
            for k in shots:
                classes[f"{k}-shot"] = prototypes(support[: k * C], labels.repeat(k), C)
            for name, P in classes.items():
                right = (query @ P.T).argmax(1) == labels.repeat(queries)
                found.setdefault(name, []).append(100 * right.float().mean().item())
        return {name: sum(values) / len(values) for name, values in found.items()}


def uniform(low, high, *shape, device):
    return torch.rand(shape, device=device).mul_(high - low).add_(low)


def draw_cards(cards, characters, split):
    """One card each: the character somewhere, warped, under a plate with a random number of three
    digits, both in random typefaces of the split, in random shades, with noise. characters (B,)
    int64 -> images (B, 1, 32, 32) float32 in about [0, 1], numbers (B, 3) int64."""
    B, faces = len(characters), FACE_SPLITS[split]
    random = partial(uniform, device=characters.device)
    dark, light = random(0, 0.3, B, 1, 1, 1), random(0.6, 1, B, 1, 1, 1)
    swap = random(0, 1, B, 1, 1, 1) < 0.5
    paper, pen = torch.where(swap, dark, light), torch.where(swap, light, dark)

    drawn = cards.drawn[characters, faces]
    face = (random(0, 1, *drawn.shape) * drawn).argmax(1) + faces.start  # one of those drawn
    ink = warp(cards.glyphs[characters, face][:, None] / 255)
    numbers = torch.randint(10, (B, 3), device=characters.device)
    images = torch.lerp(paper, pen, ink)
    lay_plates(images, cards, numbers, split, paper, pen)

    ramp = torch.linspace(-0.03, 0.03, SIZE, device=characters.device)
    shade = random(-1, 1, B, 1, 1, 1) * ramp + random(-1, 1, B, 1, 1, 1) * ramp[:, None]
    return images.add_(shade).add_(random(-0.02, 0.02, *images.shape)), numbers


def warp(images):
    """Turn (up to 0.15 radians), shear (0.2), scale (0.8 to 1.6), move (5 pixels) and bend (half a
    pixel, at random, each of 4 x 4 points). images (B, 1, S, S) -> the same."""
    random = partial(uniform, device=images.device)
    B, S = len(images), images.shape[-1]
    angle, shear = random(-0.15, 0.15, B, 1, 1), random(-0.2, 0.2, B, 1, 1)
    scale = random(0.8, 1.6, B, 1, 1)
    cos, sin = angle.cos() / scale, angle.sin() / scale
    bend = random(-1, 1, B, 2, 4, 4) / S

    # where 4 x 4 points come from, (B, 2, 4, 4), in grid_sample's -1 to 1; a pixel's place is
    # interpolated between theirs by tents (4, S), 1 at a point and 0 at the next
    k = torch.arange(4, device=images.device)
    knots = (2 * k / 3 - 1) * (1 - 1 / S)  # from the first pixel's centre to the last's
    x = knots + random(-10, 10, B, 1, 1) / S
    y = knots[:, None] + random(-10, 10, B, 1, 1) / S
    points = torch.stack((cos * x + (shear / scale - sin) * y, sin * x + cos * y), dim=1) + bend
    tents = (1 - (torch.linspace(0, 3, S, device=images.device) - k[:, None]).abs()).clamp_min(0)
    grid = (tents.T @ points @ tents).permute(0, 2, 3, 1)
    return F.grid_sample(images, grid, align_corners=False)


def lay_plates(images, cards, numbers, split, paper, pen):
    """Lay a plate of 24 x 9 pixels with a number over each image, near its top or bottom edge.
    images (B, 1, 32, 32), changed in place; numbers (B, 3) digits; paper, pen: the shades."""
    integers = partial(torch.randint, size=(len(images), 1), device=images.device)
    face = integers(FACE_SPLITS[split].start, FACE_SPLITS[split].stop)
    plates = torch.cat(cards.digits[numbers, face].unbind(1), dim=2) / 255  # (B, 9, 24)
    row = integers(4) + 20 * integers(2) + torch.arange(9, device=images.device)
    column = integers(9) + torch.arange(24, device=images.device)
    plates = torch.lerp(paper[:, 0], pen[:, 0], plates)
    image = torch.arange(len(images), device=images.device)[:, None, None]
    images[image, 0, row[:, :, None], column[:, None]] = plates


# ---- 6. Captions and images of your own ----------------------------------------------------------

COLUMN_NAMES = [  # of the image and of the caption
    ["image", "image_name", "file_name", "filename", "filepath", "path"],
    ["caption", "comment", "text", "title", "sentence"],
]
TABLES = ["captions.txt", "Flickr8k.token.txt", "*.token", "captions_*.json", "*.csv", "*.tsv"]
FOLDERS = ["Images", "images", "Flicker8k_Dataset", "flickr30k_images", "flickr30k-images"]
READ = {"encoding": "utf-8-sig", "errors": "replace"}  # by U+FFFD, with which a caption is bad
EXTENSIONS = (*datasets.folder.IMG_EXTENSIONS, ".gif", ".avif")


def standard(name):
    """One spelling of an image's name: ./a.jpg is a.jpg, accents are composed."""
    return unicodedata.normalize("NFC", os.path.normpath(name.strip()))


def visible(name):
    return not name.startswith(".") and name != "__MACOSX"


def read_table(path):
    """[(image's name, caption, place)], empty where a row is broken: of COCO's JSON, Flickr's
    name.jpg#0<TAB>caption, or columns with names, between them a comma, tab, semicolon or bar."""
    if path.suffix == ".json":
        content = json.loads(path.read_text(**READ))
        names = {image["id"]: image["file_name"] for image in content["images"]}
        notes = enumerate(content["annotations"], start=1)
        return [(names.get(n["image_id"]) or "", f"{n['caption'] or ''}", row) for row, n in notes]
    lines = io.StringIO(path.read_text(**READ)).readlines() or [""]
    if re.match(r"[^\t]+#\d+\t", lines[0]):
        pairs = [re.sub(r"#\d+\t", "\t", line.strip(), count=1).partition("\t") for line in lines]
        return [(name, text, row) for row, (name, _, text) in enumerate(pairs, 1) if name or text]
    delimiter = max(",\t;|", key=lines[0].count)
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(lines, delimiter=delimiter)
    header = [name.strip().lower() for name in next(reader)]
    known = [[header.index(name) for name in names if name in header] for names in COLUMN_NAMES]
    if not all(known):
        raise ValueError(f"it begins {lines[0][:60]!r}; unpack .tar and .parquet")
    image, caption = (columns[0] for columns in known)
    rows = []
    for row in filter(None, reader):
        swallowed = " ".join(cell for cell in row if "\n" in cell and delimiter in cell).lower()
        if any(extension in swallowed for extension in EXTENSIONS):
            raise ValueError(f"a quote is not closed before line {reader.line_num}")
        pair = (row[image].strip(), row[caption]) if len(row) == len(header) else ("", "")
        rows.append((*pair, reader.line_num))
    return rows


def read_pairs(folder):
    """The same of images and texts, a.jpg and a.txt, a caption per line; links are followed."""
    names, visited = [], set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real, here = os.path.realpath(place), os.path.relpath(place, folder)
        if real in visited:  # a link to a folder above
            folders.clear()
            continue
        visited.add(real)
        folders[:] = filter(visible, folders)
        names += [os.path.normpath(f"{here}/{name}") for name in filter(visible, files)]
    texts = {standard(name[:-4]): folder / name for name in names if name.lower().endswith(".txt")}
    rows = []
    for name in sorted(names):
        if name.lower().endswith(EXTENSIONS):
            text = texts.get(standard(os.path.splitext(name)[0]))
            lines = text.read_text(**READ).splitlines() if text else []
            rows += [(name, line, name) for line in lines if line.strip()] or [(name, "", name)]
    return rows


def read_captions(source):
    """{name: captions}, {name: path} and [what is wrong, a line each] of what `--data` names; an
    image's name is its path relative to the images' folder. Raises UserError."""
    if not source.exists():
        raise UserError(f"--data {source}: there is no such file or folder")
    folder = Path(os.path.abspath(source if source.is_dir() else source.parent))
    tables = [source]
    if source.is_dir():
        tables = [t for pattern in TABLES for t in sorted(folder.glob(pattern)) if visible(t.name)]
    if len(tables) > 1:
        raise UserError(f"--data {source}: which of {', '.join(map(str, tables))}?")
    with blame(f"--data {source}: no table of images and captions, known columns {COLUMN_NAMES}"):
        rows = read_table(tables[0]) if tables else read_pairs(folder)
        if not any(name for name, _, _ in rows):
            raise ValueError("no whole row, nor images with .txt files; unpack .tar and .parquet")
    names = [*FOLDERS, *(table.stem.removeprefix("captions_") for table in tables)]  # COCO's
    beside = names[2:]  # not every folder of images
    folders = [folder, *(folder / name for name in names), *(folder.parent / n for n in beside)]

    @cache
    def find(spelled):
        spellings = [spelled, standard(spelled), unicodedata.normalize("NFD", spelled)]
        places = (place / spelling for place in folders for spelling in spellings)
        path = next(filter(os.path.isfile, places), None)
        return path, path and os.path.realpath(path)

    captions, paths, same, bad = defaultdict(list), {}, {}, []
    for spelled, caption, row in rows:
        path, real = find(spelled)
        if not spelled or re.search("[\ufffd\0]", caption) or not split_words(caption):
            wrong = "it has no caption, or is not UTF-8, or columns or image_id are wrong"
            bad.append(f"{source}, {row}: {wrong}")
        elif not path:
            bad.append(f"{source}, {row}: there is no image {spelled}")
        else:
            name = same.setdefault(real, standard(spelled))  # of one image one
            paths[name] = path
            captions[name].append(caption)
    return captions, paths, bad


def open_image(source, size=2**16):
    """A path or PIL image -> PIL image, RGB: turned as its EXIF says, 16-bit and float ones scaled
    to their range, transparency laid on white. Pillow raises in many ways."""
    image = source if isinstance(source, Image.Image) else Image.open(source)
    image.draft("RGB", (2 * size, 2 * size))  # a large JPEG is not decoded in full
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":
        values = np.nan_to_num(np.asarray(image, np.float32), posinf=0, neginf=0)
        top = max(65535 if image.mode[0] == "I" else 1, values.max())
        image = Image.fromarray((255 * (values / top).clip(0, 1)).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def preprocess(settings):
    """PIL image or path -> (1, S, S) grey or, for a model of photographs, (3, S, S), float32 in
    [0, 1]: what a model is to be given."""
    size, grey = settings.image_size, [] if settings.data else [transforms.Grayscale()]
    fit = [transforms.Resize(size), transforms.CenterCrop(size), transforms.ToTensor()]
    return transforms.Compose([partial(open_image, size=size), *grey, *fit])


def read_images(read, sources, bad, skip_bad):
    """{source: read(source)} of the keys of `sources` that can be read, in threads; their values
    name them in messages. `bad` has a line for each thing wrong before. Raises UserError where
    something is bad, unless `skip_bad`."""

    def attempt(source):
        try:
            return read(source)
        except Exception as error:
            bad.append(f"{sources[source]} cannot be read ({in_one_line(error)})")

    images = thread_map(attempt, sources, desc="reading images", leave=False, disable=None)
    if bad and not skip_bad:
        raise UserError(f"{bad[0]} ({len(bad):,} such); --skip-bad goes on without")
    if bad:
        print(f"left out: {bad[0]} ({len(bad):,} such)")
    return {s: image for s, image in zip(sources, images, strict=True) if image is not None}


def split_names(folder, names):
    """{split: names kept out} and those that train: as Flickr8k's lists say, of who trains or who
    does not; without them one image in ten, 1,000 at most, is "dev". Raises UserError."""
    lists = {}
    for split in ("dev", "test", "train"):
        paths = [path for path in folder.glob(f"*{split}Images.txt") if visible(path.name)]
        if paths:
            lines = (line for path in paths for line in path.read_text(**READ).splitlines())
            lists[split] = set(map(standard, lines)) & set(names)
            if not lists[split]:
                raise UserError(f"{paths[0]}: none of its lines is an image, for one {names[:1]}")
    others = set(names) - lists.get("train", set())
    if others and not lists.keys() & {"dev", "test"}:
        others = sorted(others, key=lambda name: zlib.crc32(os.fsencode(name)))
        lists["dev"] = set(others[: min(1000, max(1, len(names) // 10))])
    train = lists.pop("train", set(names)).difference(*lists.values())
    return lists, train


class Photos:
    """Images with their captions, each decoded once: images (N, 3, S, S) uint8; tokens (N, most, L)
    of each one's captions, 0 where there are fewer; counts (N,): how many; train, held_out {split:
    [numbers of images]}. Raises UserError."""

    def __init__(self, device, settings, skip_bad=False):
        self.device = torch.device(device)
        source, fit = Path(settings.data), preprocess(settings)
        captions, paths, bad = read_captions(source)
        images = read_images(lambda name: (255 * fit(paths[name])).byte(), paths, bad, skip_bad)
        names = list(images)
        held_out, train = split_names(source if source.is_dir() else source.parent, names)
        if len(train) < settings.batch_size:
            raise UserError(f"--data {source}: only {len(train)} images to train on; --batch-size?")
        train = [i for i, name in enumerate(names) if name in train]
        self.train, self.held_out = torch.tensor(train, device=device), {}
        for split, kept in held_out.items():
            self.held_out[split] = [i for i, name in enumerate(names) if name in kept]
        captions = [captions[name] for name in names]
        texts = [text for i in train for text in captions[i]]
        self.vocabulary = build_vocabulary(texts, least=5)  # rarer words are unknown
        tokens = tokenize([text for texts in captions for text in texts], self.vocabulary)
        unknown = ((tokens == 1).sum() / (tokens != 0).sum()).item()
        if unknown > 0.9:
            raise UserError(f"--data {source}: {unknown:.1%} of the words come fewer than 5 times")
        self.about = f"{len(train):,} images, {len(self.vocabulary)} words, {unknown:.0%} unknown"
        counts = [len(texts) for texts in captions]
        self.counts = torch.tensor(counts, device=device)
        self.tokens = nn.utils.rnn.pad_sequence(tokens.split(counts), batch_first=True).to(device)
        pixels = torch.stack(list(images.values()))
        checksum = zlib.crc32(repr((captions, train)).encode())
        self.fingerprint = zlib.crc32(pixels.numpy(), checksum)
        self.images = pixels.to(device)

    def draw_batch(self, settings, step):
        """This process's part of a batch: images (n, 3, S, S) in [0, 1], tokens (n, L). No image
        comes twice, its captions would be false negatives: all processes choose with one seed. Of
        each one caption, and a square of half the area or more, mirrored half the time."""
        shared = np.random.default_rng([settings.seed, step])
        chosen = shared.choice(len(self.train), settings.batch_size, replace=False)
        chosen = torch.from_numpy(chosen.reshape(PROCESSES, -1)[RANK])
        chosen = self.train[chosen.to(self.device, non_blocking=True)]
        B, random = len(chosen), partial(uniform, device=self.device)
        tokens = self.tokens[chosen, (random(0, 1, B) * self.counts[chosen]).long()]
        scale = random(0.5, 1, B, 1, 1).sqrt()
        mirror = random(-1, 1, B, 1, 1).sign()
        right, down = random(-1, 1, 2, B, 1, 1) * (1 - scale)
        images, S = self.images[chosen] / 255, self.images.shape[-1]
        pixels = torch.linspace(1 / S - 1, 1 - 1 / S, S, device=self.device)  # in half images
        x, y = scale * mirror * pixels + right, scale * pixels[:, None] + down
        grid = torch.stack(torch.broadcast_tensors(x, y), dim=3)  # where each pixel comes from
        return F.grid_sample(images, grid, align_corners=False), tokens

    @torch.no_grad()
    def validate(self, model):
        """{"dev text>image R@1": ..., ...} in percent, of the held-out images: whether a caption's
        image is among its 1, 5, 10 nearest, and whether one of an image's captions is."""
        found = {}
        for split, chosen in self.held_out.items():
            images, tokens = self.images[chosen], self.tokens[chosen]
            there = tokens[..., 0] != 0  # (N, most)
            owner = there.nonzero()[:, 0]  # each caption's image
            image = torch.arange(len(chosen), device=self.device)
            x = torch.cat([model.encode_image(part / 255, True) for part in images.split(256)])
            t = torch.cat([model.encode_text(part, True) for part in tokens[there].split(1024)])
            for k in (1, 5, 10):
                hit = (t @ x.T).topk(min(k, len(x))).indices == owner[:, None]
                found[f"{split} text>image R@{k}"] = 100 * hit.any(1).float().mean().item()
                hit = owner[(x @ t.T).topk(min(k, len(t))).indices] == image[:, None]
                found[f"{split} image>text R@{k}"] = 100 * hit.any(1).float().mean().item()
        return found


# ---- 7. Files and the command line ---------------------------------------------------------------

FORMAT = "contextclip-3"  # of the checkpoints
KEYS = {"settings", "vocabulary", "fingerprint", "model", "optimizer", "log", "seconds", "result"}


@contextlib.contextmanager
def blame(what):
    """Whatever fails within becomes a UserError that begins with `what`."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{what}: {in_one_line(error)}") from None


def in_one_line(error):
    return " ".join(str(error).split())[:300] or type(error).__name__


def write_file(path, content):
    """bytes to a temporary file, then renamed: `path` is always whole, the old or the new one."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_csv(path, rows):
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    write_file(path, text.getvalue().encode(errors="surrogateescape"))


def save(path, model, optimizer, data, log, seconds, result=None):
    """A checkpoint and, beside it, the log. Raises OSError."""
    content = {
        "format": FORMAT, "settings": asdict(model.settings), "vocabulary": list(model.vocabulary),
        "fingerprint": data.fingerprint, "model": model.state_dict(), "log": log,
        "optimizer": optimizer.state_dict(), "seconds": seconds, "result": result,
    }  # fmt: skip
    buffer = io.BytesIO()
    torch.save(content, buffer)
    if RANK == 0:
        write_file(path, buffer.getvalue())
        write_csv(path.with_suffix(".csv"), [COLUMNS, *log])


def read_checkpoint(path):
    """The dictionary that `save` wrote. Raises UserError."""
    with blame(f"{path} is not a checkpoint of contextclip"):
        content = torch.load(path, map_location="cpu", weights_only=True)
        version, missing = content["format"], KEYS - content.keys()
        if missing and version == FORMAT:
            raise KeyError(f"it lacks {missing}")
    if version != FORMAT:
        raise UserError(f"{path} is of another version of contextclip ({version}): train it again")
    return content


def check_resumable(path, content, settings, data):
    """To go on, all must be as it was, but there may be more steps. Raises UserError."""
    for name, old in content["settings"].items():
        new = getattr(settings, name)
        if old != new and name != "data" and not (name == "steps" and old < new):
            raise UserError(f"--resume: {path} was made with {name} {old}, not {new}")
    if content["fingerprint"] != data.fingerprint:
        raise UserError(f"--resume: {path} was made with other images or captions")


def load(path, device="cpu"):
    """A trained model for use, with its `vocabulary` for `tokenize`. Raises UserError."""
    content = read_checkpoint(path)
    with blame(f"{path} is damaged"):
        settings = replace(Settings(**content["settings"]), pretrained=False)  # weights are here
        vocabulary = {word: token for token, word in enumerate(content["vocabulary"])}
        model = ContextCLIP(settings, vocabulary)
        model.load_state_dict(content["model"])
    if not content["result"]:
        print(f"note: the training of {path} is not finished (step {content['log'][-1][0]})")
    return model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


def lock(folder):
    """Make a folder and keep other runs out while the returned file is open. Raises UserError."""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / ".lock", "a")
    with blame(f"--out {folder}: another run is writing there"):
        with contextlib.suppress(ImportError):  # on Windows
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return file


def choose_device(name="auto"):
    """A torch device that works, with its global switches set. Raises UserError."""
    if name == "auto":
        name = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    with blame(f"--device {name}"):
        device = torch.device(name)
        torch.zeros(1, device=device).item()
        if device.type == "cuda":
            torch.cuda.set_device(device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    return device


def print_table(rows):
    """Print dictionaries of the same keys, a line each; a column each where there are many keys."""
    if not rows:
        return
    formats = {"loss": ".3f", "seconds": ".0f", "images/s": ",.0f"}
    cells = [list(rows[0])]
    for row in rows:
        numbers = {k: v for k, v in row.items() if not isinstance(v, str)}
        texts = {k: f"{v:{formats.get(k, '.1f')}}" for k, v in numbers.items()}
        cells.append(list((row | texts).values()))
    if len(cells[0]) > 10:
        cells = list(zip(*cells, strict=True))
    first, *widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for name, *others in cells:
        columns = [cell.rjust(width) for cell, width in zip(others, widths, strict=True)]
        print(name.ljust(first), *columns, sep="  ")


@contextlib.contextmanager
def errors_in_one_line(program, stopped="stopped"):
    """What a user can mend is one line and exit status 2."""
    try:
        with contextlib.suppress(AttributeError):  # of a notebook
            sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8
        yield
        return
    except KeyboardInterrupt:
        status, message = 130, stopped
    except BrokenPipeError:  # | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(2)
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in repr(error).lower():
            raise
        status, message = 2, in_one_line(error)
    print(f"{program}: {message}", file=sys.stderr)
    sys.exit(status)


def make_parser():
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, description="Train and compare.")
    # the comments of Settings are the help
    helps = dict(re.findall(r"    (\w+): \w+ = .*?  # (.*)", inspect.getsource(Settings)))
    add = parser.add_argument
    switch = partial(add, action="store_true")
    for field in fields(Settings):
        option = switch if field.type is bool else partial(add, type=field.type, metavar="X")
        text = f"{helps[field.name]} (%(default)s)"
        option(f"--{field.name.replace('_', '-')}", default=field.default, help=text)
    parser.set_defaults(objective="clip,clixp")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps (auto)")
    add("--out", type=Path, default=Path("runs"), help="folder for checkpoints and logs (runs)")
    add("--init", type=Path, help="post-training: start from the weights of this checkpoint")
    switch("--resume", help="go on where the same command was interrupted")
    switch("--compile", help="torch.compile the encoders")
    switch("--skip-bad", help="with --data, leave out rows and images that cannot be read")
    return parser


@errors_in_one_line("contextclip", "stopped; the same command with --resume goes on")
def main(arguments=None):
    args = make_parser().parse_args(arguments)
    given = {field.name: getattr(args, field.name) for field in fields(Settings)}
    runs = [Settings(**given | {"objective": name}) for name in args.objective.split(",")]
    device = choose_device(args.device)
    if PROCESSES > 1:  # the batch is divided between them
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        sys.stdout = open(os.devnull, "w") if RANK else sys.stdout
    if args.batch_size % PROCESSES:
        raise UserError(f"--batch-size {args.batch_size}: not a multiple of {PROCESSES} processes")
    init = read_checkpoint(args.init) if args.init else None
    with contextlib.nullcontext() if RANK else lock(args.out):
        data = Photos(device, runs[0], args.skip_bad) if args.data else Cards(device, runs[0])
        results = [train(s, data, args.out, args.resume, init, args.compile) for s in runs]
    print_table(results)
    more = " --data FOLDER" if args.data else ""
    print(f"next: python fewshot.py --out '{args.out}'{more}")
    if PROCESSES > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
