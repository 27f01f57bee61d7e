"""ContextCLIP: an open reimplementation of Roth, Akata, Damen, Balažević, Hénaff, "Context-Aware
Multimodal Pretraining", CVPR 2025 (arXiv 2411.15099).

The method: 1 contrastive losses, 2 the loss with context, 3 text, 4 the model, 5 training.
The rest: 6 checkpoints, 7 cards, the images that are drawn here, 8 captions and images of your own,
9 the command line. `python contextclip.py --help` lists every setting.
"""

import argparse
import copy
import csv
import io
import math
import os
import re
import sys
import time
import unicodedata
import zlib
from collections import Counter
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib import ft2font, get_data_path
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision import datasets, models
from torchvision.transforms import functional as TF
from tqdm import tqdm

OBJECTIVES = ["clip", "siglip", "clixp", "siglixp"]  # the last two have the context loss


class UserError(ValueError):
    """A mistake in what the user gave: the command line prints it as one line, exit status 2."""


def setting(default, help, least=None, most=1e9):
    """A field with its help text and, of a number, the least and the greatest value."""
    return field(default=default, metadata={"help": help, "least": least, "most": most})


@dataclass
class Settings:
    """Everything that determines a run, besides the number of processes. Each is also a flag; the
    command line trains "clip" and "clixp" if --objective is not given."""

    objective: str = setting(
        "clixp", f"one of {', '.join(OBJECTIVES)}; the flag takes several, a,b"
    )
    data: str = setting("cards", "cards, or a folder or table of your own images and captions")
    seed: int = setting(0, "of the initial weights and of every batch", 0)
    steps: int = setting(3200, "optimiser steps", 1)
    batch_size: int = setting(512, "B; the other B - 1 images are the context of an image", 2, 1e6)
    lr: float = setting(2e-3, "peak learning rate: linear warm-up, then a cosine to 0", 0)
    weight_decay: float = setting(0.1, "of matrices; temperatures, biases and gains have none", 0)
    width: int = setting(64, "d, of the embeddings and inside both encoders", 2, 1e5)
    image_size: int = setting(32, "height and width of what the image encoder gets, in pixels", 1)
    encoder: str = setting("cnn", "image encoder: cnn, or a classification model of torchvision")
    pretrained: bool = setting(False, "start that model from torchvision's weights (a download)")
    alpha: float = setting(0.9, "weight of the plain loss; the context loss has 1 - alpha", 0, 1)
    tau_max: float = setting(100.0, "cap of tau_1 and tau_2, as in public CLIP code", 1)
    no_mask: bool = setting(False, "ablation: an image may attend to itself")
    shared_temperature: bool = setting(False, "ablation: tau_1 and b_1 serve the context loss too")
    detach_values: bool = setting(False, "ablation: no gradient into the values V")
    number_share: float = setting(1.0, "share of the cards whose caption names their number", 0, 1)
    init: str = setting("", "post-training: a checkpoint to start from")
    chunk: int = setting(
        0, "compute losses in blocks of so many rows, to save memory; 0: at once", 0
    )
    float32: bool = setting(False, "never use bf16, even where the hardware has it")

    @property
    def is_sigmoid(self):
        return self.objective.startswith("sig")

    @property
    def has_context(self):
        return self.objective.endswith("xp")

    @property
    def is_cards(self):
        return self.data == "cards"

    def __post_init__(self):
        if self.objective not in OBJECTIVES:
            raise UserError(f"--objective {self.objective!r}: it is one of {', '.join(OBJECTIVES)}")
        if not self.data:
            raise UserError("--data is empty: cards, or a folder or table of yours")
        for each in fields(self):
            _, least, most = each.metadata.values()  # in the order of `setting`
            value = getattr(self, each.name)
            if least is not None and not least <= value <= most:  # so written, nan is refused too
                raise UserError(
                    f"--{each.name.replace('_', '-')} {value}: it is from {least} to {most:g}"
                )


# ---- 1. Contrastive losses -----------------------------------------------------------------------
# X, T (B, d): normalised embeddings of the images and of the captions of a batch; row j of both is
# a pair. i (n,) are row indices, 0 to B - 1 unless processes or blocks divide the rows. They are
# also the right answers, since image i has caption i. A loss returns a term in nats for each of
# them. The loss L of the paper is the mean over all B rows.


def clip_loss(i, X, T, tau, b=None):
    """Softmax contrastive loss, InfoNCE (Radford et al. 2021). Logits s_ij = tau x_i.t_j; the mean
    of two cross-entropies, of the image's caption among all captions and of the caption's image
    among all images. It has no bias b: the argument is there so that both losses are called alike.
    """
    image_to_text = F.cross_entropy(tau * X[i] @ T.T, i, reduction="none")
    text_to_image = F.cross_entropy(tau * T[i] @ X.T, i, reduction="none")
    return (image_to_text + text_to_image) / 2


def siglip_loss(i, X, T, tau, b):
    """Sigmoid contrastive loss (Zhai et al. 2023). Every image with every caption is a yes-or-no
    question: -sum_j log sigmoid(z_ij s_ij), with logits s_ij = tau x_i.t_j + b and labels z_ij = 1
    where j = i, else -1."""
    s = tau * X[i] @ T.T + b
    z = 2 * F.one_hot(i, len(T)) - 1
    return -F.logsigmoid(z * s).sum(1)


# ---- 2. The loss with context --------------------------------------------------------------------
def contextualize(i, X, V, tau_ctx, mask=True):
    """x_ctx_i = softmax_j( x_i.x_j / (tau_ctx sqrt(d)) ) V, with `mask` over j != i only: image i
    rebuilt from the others. X (B, d), the normalised embeddings of the batch's images, are queries
    and keys. V (B, d), the same before normalisation, are values. Returns (n, d)."""
    scores = X[i] @ X.T / (tau_ctx * X.shape[1] ** 0.5)
    if mask:
        scores = scores.scatter(1, i[:, None], -math.inf)
    return scores.softmax(1) @ V


class LIxPLoss(nn.Module):
    """L_LIxP = alpha L(X, T; tau_1) + (1 - alpha) L(X_ctx, T; tau_2), with what it learns; for the
    objectives clip and siglip the plain loss L(X, T; tau_1) alone. To use it elsewhere:

    criterion = LIxPLoss(Settings("clixp", width=512))  # d of your embeddings
    loss, plain_loss, context_loss = criterion(v, u)  # embeddings that are not normalised

    It is a module because tau_1, tau_2 and tau_ctx (and, of the sigmoid loss, b_1 and b_2) are
    parameters. Give them to the optimiser, without weight decay, and call `clamp` after each step.
    With several processes, put it inside the module that DistributedDataParallel wraps. Call it
    outside of torch.autocast, with float32. To go on from a finished CLIP, set tau_max at least to
    its scale, else the first `clamp` cuts it, and copy its logarithm, which is what CLIP stores:
    log_tau.data[:2] = model.logit_scale.data; for SigLIP also b.data[:] = model.logit_bias.data."""

    def __init__(self, settings):
        super().__init__()
        self.settings = settings
        tau = min(10.0 if settings.is_sigmoid else 5.0, settings.tau_max)
        tau_ctx = 0.25 / settings.width**0.5  # then the attention divides cosines by 0.25
        self.log_tau = nn.Parameter(torch.tensor([tau, tau, tau_ctx]).log())
        self.b = nn.Parameter(torch.full((2,), -10.0))

    def scalars(self):
        """{name: value of what is learned}. tau_1 and tau_2 multiply cosines, tau_ctx
        sqrt(d) divides them; each tau is the exponential of a parameter."""
        names = ["tau_1", "tau_2", "tau_ctx", "b_1", "b_2"]
        # slices of one tensor, so that the gradient of what a loss does not use is 0 instead of
        # None, which DistributedDataParallel refuses
        values = torch.cat((self.log_tau.exp(), self.b)).unbind()
        return dict(zip(names, values, strict=True))

    @torch.no_grad()
    def clamp(self):
        """Keep tau_1 and tau_2 between 1 and their cap. CLIP's authors cap at 100, beyond which
        their training was unstable; the README shows what a lower cap does."""
        self.log_tau[:2].clamp_(0, math.log(self.settings.tau_max))

    def forward(self, v, u):
        """v, u (n, d): embeddings of this process's images and captions, not normalised; n is the
        same in all processes. Returns three scalars in nats, means over these n pairs: the loss,
        its plain term, its context term. Raises ValueError if the shapes do not fit."""
        settings = self.settings
        tau_1, tau_2, tau_ctx, b_1, b_2 = self.scalars().values()
        if v.shape != u.shape or v.shape[1:] != (settings.width,):
            raise ValueError(f"v {v.shape} and u {u.shape}: both are (n, width {settings.width})")
        V, U = gather(v), gather(u)
        X, T = F.normalize(V), F.normalize(U)  # (B, d), of the whole batch
        if len(X) < 2:
            raise ValueError("a batch of one pair has neither negatives nor a context")
        i = torch.arange(len(v), device=v.device) + rank() * len(v)  # this process's rows

        L = siglip_loss if settings.is_sigmoid else clip_loss
        plain = in_blocks(settings.chunk, L, i, X, T, tau_1, b_1).mean()
        if not settings.has_context:
            return plain, plain, torch.zeros_like(plain)

        if settings.shared_temperature:
            tau_2, b_2 = tau_1, b_1
        if settings.detach_values:
            V = V.detach()
        mask = not settings.no_mask
        x_ctx = in_blocks(settings.chunk, contextualize, i, X, V, tau_ctx, mask)
        X_ctx = F.normalize(gather(x_ctx))  # our reading: as X is for the plain loss
        context = in_blocks(settings.chunk, L, i, X_ctx, T, tau_2, b_2).mean()
        return settings.alpha * plain + (1 - settings.alpha) * context, plain, context


def in_blocks(chunk, function, i, *inputs):
    """function(i, *inputs), a result for each row of i. With `chunk` the rows are cut into blocks,
    and each is computed once more in the backward pass: no B x B matrix is kept."""
    if not chunk:
        return function(i, *inputs)
    blocks = [checkpoint(function, rows, *inputs, use_reentrant=False) for rows in i.split(chunk)]
    return torch.cat(blocks)


def rank():
    """The number of this process, of those that torch.distributed has started."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(x):
    """The rows of this process (n, d) -> those of all (B, d), by rank.

    A process needs all rows, as negatives and as context, but its loss L_p is the mean over its own
    rows only. The loss of the batch is the mean of the L_p of all W processes, and a row x enters
    every L_p: its gradient is 1/W sum_p dL_p/dx. The hook on all rows forms the sum, autograd
    passes on the slice of this process, and DistributedDataParallel divides by W when it averages
    the gradients of the weights. The rows of x_ctx are gathered too: each process gets the whole
    gradient of its own, and hands it on to all rows of V and X, where the hook sums once more."""
    if world_size() == 1:
        return x

    def sum_over_processes(gradient):
        gradient = gradient.contiguous().clone()  # all_reduce writes into it
        dist.all_reduce(gradient)
        return gradient

    parts = [torch.empty_like(x) for _ in range(world_size())]
    dist.all_gather(parts, x.detach())
    parts[rank()] = x  # the only one with gradients
    everyone = torch.cat(parts)
    if everyone.requires_grad:
        everyone.register_hook(sum_over_processes)
    return everyone


# ---- 3. Text -------------------------------------------------------------------------------------
MAX_WORDS = 32  # of a caption; more are cut off
# letters of scripts without spaces: Thai, Lao, Burmese, Khmer, Japanese, Chinese
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff"
WORD = f"[{UNSPACED}]|[^ {UNSPACED}]+"


def split_words(caption):
    """The words of a caption in lower case: letters with their marks, digits, hyphens, underlines.
    Where a script writes no spaces, each letter is a word."""
    text = unicodedata.normalize("NFC", caption.lower())
    kept = (c if unicodedata.category(c)[0] in "LMN" or c in "-_" else " " for c in text)
    return re.findall(WORD, "".join(kept))


def build_vocabulary(captions, min_count=1):
    """{word: token} of the words that come `min_count` times or more; 0 is padding, 1 any other
    word."""
    counts = Counter(word for caption in captions for word in split_words(caption))
    words = sorted(word for word in counts if counts[word] >= min_count)
    return {word: token for token, word in enumerate(["<pad>", "<unk>", *words])}


def tokenize(captions, vocabulary):
    """N captions, or one -> tokens (N, L) int64, L that of the longest. An empty caption is one
    unknown word."""
    captions = [captions] if isinstance(captions, str) else captions
    words = [split_words(caption)[:MAX_WORDS] or ["<unk>"] for caption in captions]
    rows = [torch.tensor([vocabulary.get(word, 1) for word in row]) for row in words]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)


class TextEncoder(nn.Module):
    """tokens (B, L) -> (B, d). Each word is an embedding plus that of its position; `heads`
    attention-weighted means of the words, side by side, go through a linear layer. This small
    encoder understands new combinations of known words."""

    def __init__(self, vocabulary_size, width, heads=8):
        super().__init__()
        self.words = nn.Embedding(vocabulary_size, width, padding_idx=0)
        self.positions = nn.Parameter(0.02 * torch.randn(MAX_WORDS, width))
        self.norm = nn.LayerNorm(width)
        self.attention = nn.Linear(width, heads)
        self.out = nn.Linear(heads * width, width)

    def forward(self, tokens):
        h = self.norm(self.words(tokens) + self.positions[: tokens.shape[1]])  # (B, L, d)
        scores = self.attention(h).masked_fill(tokens[..., None] == 0, -math.inf)  # (B, L, heads)
        pooled = scores.softmax(1).mT @ h  # (B, heads, d)
        return self.out(pooled.flatten(1))


# ---- 4. Model ------------------------------------------------------------------------------------
def cnn(channels, size, width):
    """(B, channels, size, size) -> (B, d). Group norm, not batch norm: so an embedding depends on
    its image alone, and context enters by the loss only. (With most encoders of torchvision, which
    have batch norm, this is not so.) No pooling: it would lose where on the card a digit stands."""

    def layer(inputs, outputs, stride):
        return [nn.GroupNorm(1, inputs), nn.ReLU(True), nn.Conv2d(inputs, outputs, 3, stride, 1)]

    features, side = width // 2, math.ceil(size / 4)
    layers = [nn.Conv2d(channels, features, 7, stride=4, padding=3), *layer(features, features, 1)]
    while side > 4:  # 32 pixels: from (d/2, 8, 8) to (d, 4, 4)
        layers += [*layer(features, width, 2), *layer(width, width, 1)]
        features, side = width, math.ceil(side / 2)
    layers += [nn.GroupNorm(1, features), nn.ReLU(True), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(features * side**2, width))


def torchvision_encoder(settings):
    """(B, 3, S, S) -> (B, d): a linear layer on the 1,000 outputs of a classifier. Raises UserError
    if torchvision has none of that name, or it does not turn such images into a tensor."""
    name, S = settings.encoder, settings.image_size
    try:
        classifier = models.get_model(name, weights="DEFAULT" if settings.pretrained else None)
        encoder = nn.Sequential(classifier, nn.Linear(1000, settings.width))
        copy.deepcopy(encoder)(torch.zeros(2, 3, S, S))  # a copy: it updates batch norm's means
    except Exception as error:
        raise UserError(f"--encoder {name}, --image-size {S}: {error}") from error
    return encoder


class ContextCLIP(nn.Module):
    """Both encoders and the loss. Every objective has the same parameters, drawn in the same order:
    with one seed, a baseline and a context model start equal."""

    def __init__(self, settings, vocabulary):
        super().__init__()
        self.settings, self.vocabulary = settings, vocabulary
        self.channels = 1 if settings.encoder == "cnn" and settings.is_cards else 3
        if settings.encoder == "cnn":
            self.image_encoder = cnn(self.channels, settings.image_size, settings.width)
        else:
            self.image_encoder = torchvision_encoder(settings)
        self.text_encoder = TextEncoder(len(vocabulary), settings.width)
        self.loss = LIxPLoss(settings)

    def forward(self, images, tokens):
        """images (n, 1 or 3, S, S), tokens (n, L) -> the loss, its plain and its context term."""
        return self.loss(self.encode_image(images), self.encode_text(tokens))

    def encode_text(self, tokens):
        """tokens (n, L) -> u (n, d), not normalised."""
        return self.text_encoder(tokens)

    def encode_image(self, images):
        """images (n, 1 or 3, S, S) in about [0, 1] -> v (n, d) float32, not normalised. Images of
        another size are resized; the cnn of cards takes images of one channel only."""
        images = TF.resize(images, [self.settings.image_size] * 2)
        images = 4 * images.expand(-1, self.channels, -1, -1) - 2  # mean 0, deviation about 1
        images = images.contiguous(memory_format=torch.channels_last)
        bf16 = torch.cpu.get_capabilities().get("avx512_bf16", False)  # in hardware
        if images.is_cuda:
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        bf16 = bf16 and not self.settings.float32
        with torch.autocast(images.device.type, torch.bfloat16, bf16):
            return self.image_encoder(images).float()


def embed_images(model, images):
    """images (N, 1 or 3, S, S) -> x (N, d) normalised, in parts that fit in memory."""
    return F.normalize(torch.cat([model.encode_image(part) for part in images.split(256)]))


def embed_classes(model, captions):
    """C lists of equally many captions -> T (C, d) normalised, the mean of each list. A model of
    cards expects a number after a name, so each caption gets ten, 000, 111, ... 999, and the mean
    is over these as well."""
    endings = [""]
    if model.settings.is_cards and model.settings.number_share:
        endings = [f" {spell(number)}" for number in range(0, 1000, 111)]
    texts = [text + ending for group in captions for text in group for ending in endings]
    tokens = tokenize(texts, model.vocabulary).to(model.loss.b.device)
    t = F.normalize(model.encode_text(tokens)).unflatten(0, (len(captions), -1))
    return F.normalize(t.mean(1))


# ---- 5. Training ---------------------------------------------------------------------------------
# `data` is Cards or Photos, of sections 7 and 8. They have
#   draw_batch(settings): this process's part of a batch, images (n, C, S, S) and tokens (n, L);
#     of cards no number comes twice (process r of W takes every W-th number, from r),
#   validate(model): {measure: percent}, computed without gradients,
#   `vocabulary`, `device`, and `about`, a line of text that describes them.
# `log` has a dictionary for step 0, then one for each validation.
EVERY = 200  # steps from one validation, line of the log and checkpoint to the next


def train(settings, data, out):
    """Train a model on Cards or Photos, into out/<objective>.pt and .csv. A checkpoint that is
    there already goes on where it stopped (the command line wants --resume for that). Raises
    UserError, OSError."""
    path = out / f"{settings.objective}.pt"
    # section 6: new, from --init, or as saved; the model is in train mode
    model, optimizer, log = build_or_resume(settings, data, path)
    forward = nn.parallel.DistributedDataParallel(model) if world_size() > 1 else model
    first, begin = log[-1]["step"] + 1, time.perf_counter() - log[-1]["seconds"]
    recent = []  # losses since the last line of the log

    hide = True if rank() else None  # None: tqdm shows a bar in a terminal only
    for step in tqdm(range(first, settings.steps + 1), disable=hide):
        # the only source of chance in a step: so a resumed run is the same as one without a stop,
        # and all objectives see the same batches; hashes of integers are the same in every run
        torch.manual_seed(hash((settings.seed, step, rank())))
        images, tokens = data.draw_batch(settings)
        loss, plain_loss, context_loss = forward(images, tokens)

        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.loss.clamp()

        recent.append(torch.stack((loss, plain_loss, context_loss)).detach())
        if step % EVERY == 0 or step == settings.steps:
            losses = torch.stack(recent).mean(0).tolist()
            recent.clear()
            check_finite(model, losses, step)
            if rank() == 0:
                row = {"step": step, "seconds": time.perf_counter() - begin}
                row |= dict(zip(["loss", "plain_loss", "context_loss"], losses, strict=True))
                row |= {name: value.item() for name, value in model.loss.scalars().items()}
                measures = data.validate(model.eval())
                model.train()
                if len(log) == 1:  # before the first save: did another run take the name?
                    check_free(path)
                log.append(row | measures)
                save(path, model, optimizer, log)
                report_progress(path.stem, row, measures)


def report_progress(name, row, measures):
    """Print what somebody who waits wants to see of a row of the log."""
    found = "  ".join(f"{key} {value:.1f}" for key, value in measures.items())
    tqdm.write(
        f"{name}  step {row['step']}  {row['seconds']:.0f} s  loss {row['loss']:.3f}  {found}"
    )


def check_finite(model, losses, step):
    """Raises UserError if the losses or a weight are not finite: such a model is not saved."""
    if not math.isfinite(sum(losses) + nn.utils.get_total_norm(model.parameters())):
        raise UserError(f"not finite by step {step}, earlier saves are kept; try a lower --lr")


def learning_rate(step, settings):
    """The smaller of a linear warm-up over a twentieth of the steps and a cosine to 0."""
    warmup = step / max(1, settings.steps // 20)
    cosine = (1 + math.cos(math.pi * (step - 1) / settings.steps)) / 2
    return settings.lr * min(warmup, cosine)


def make_optimizer(model):
    """AdamW, with weight decay for matrices only. Its betas are those of the CLIP paper. `train`
    sets the learning rate before every step."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    return torch.optim.AdamW(
        [{"params": matrices}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
        weight_decay=model.settings.weight_decay,
        fused=True,
    )


# ---- 6. Checkpoints ------------------------------------------------------------------------------
def build_or_resume(settings, data, path):
    """A model, its optimiser and its log: new, or as saved at `path`. Raises UserError, OSError."""
    if path.exists():
        model, optimizer, log = resume(settings, data, path)
    else:
        torch.manual_seed(hash((settings.seed, 0)))
        model = ContextCLIP(settings, data.vocabulary)
        if settings.init:
            start_from(load(settings.init), model)
        model.to(data.device, memory_format=torch.channels_last)
        optimizer = make_optimizer(model)
        log = [{"step": 0, "seconds": 0.0, "data": data.about}]

    # of equal logits. SigLIP starts with small ones for all pairs but its own (b = -10): at chance,
    # its one positive pair costs about log B, and B - 1 negatives about 1 / B each, 1 together
    chance = math.log(settings.batch_size) + settings.is_sigmoid
    print(f"{path.stem}: {data.device}, {data.about}; a loss of {chance:.2f} is chance")
    return model, optimizer, log


def resume(settings, data, path):
    """The same of a checkpoint. Raises UserError if it was made with other settings or data."""
    model, optimizer, log = read_checkpoint(path, data.device)
    changed = dict(asdict(model.settings).items() - asdict(settings).items())
    if changed:
        raise UserError(f"--resume: {path} was made with {changed}")
    if model.vocabulary != data.vocabulary or log[0]["data"] != data.about:
        raise UserError(f"--resume: {path} was made with other images or captions")
    return model.train(), optimizer, log


def start_from(base, model):
    """Post-training: all weights of another model. A baseline has learned neither tau_2 nor b_2:
    they start as its tau_1, b_1. Raises UserError if the models differ."""
    if base.vocabulary != model.vocabulary or str(base) != str(model):  # str: all layers and sizes
        raise UserError("--init: that model has other words, or another encoder or width")
    model.load_state_dict(base.state_dict())
    if not base.settings.has_context:
        model.loss.log_tau.data[1] = model.loss.log_tau.data[0]
        model.loss.b.data[1] = model.loss.b.data[0]


def check_free(path):
    """Raises UserError if a run has taken this name."""
    if path.exists():
        raise UserError(f"{path} is there: --resume goes on with it, or take another --out")


def save(path, model, optimizer, log):
    """Write a checkpoint, and its log as a table beside it. Raises OSError."""
    content = {
        "settings": asdict(model.settings),
        "vocabulary": model.vocabulary,
        "log": log,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_whole(path, buffer.getvalue())
    write_csv(path.with_suffix(".csv"), log[1:])


def write_csv(path, rows):
    """Write dictionaries of the same keys. Raises OSError."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, text.getvalue().encode("utf-8", "replace"))


def write_whole(path, content):
    """Write bytes by way of another file: `path` has them all, or is as before. Raises OSError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_checkpoint(path, device="cpu"):
    """What `save` wrote: the model, its optimiser, the log. Raises UserError."""
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
        settings = Settings(**saved["settings"])
        model = ContextCLIP(replace(settings, pretrained=False), saved["vocabulary"])  # no download
        model.load_state_dict(saved["model"])
        model.settings = settings
        model.to(device, memory_format=torch.channels_last)
        optimizer = make_optimizer(model)
        optimizer.load_state_dict(saved["optimizer"])
        model.finished = saved["log"][-1]["step"] >= settings.steps
        return model, optimizer, saved["log"]
    except Exception as error:
        raise UserError(f"{path}: no checkpoint of this version ({error!r:.60})") from error


def load(path, device="cpu"):
    """A trained model for use, with its `vocabulary` for `tokenize`. Raises UserError."""
    model, _, _ = read_checkpoint(path, device)
    if not model.finished:
        print(f"note: the training of {path} is not finished")
    return model.eval().requires_grad_(False)


# ---- 7. Cards ------------------------------------------------------------------------------------
NUMERALS = "zero one two three four five six seven eight nine".split()


def spell(number):
    """How a caption names the number of a card, from 0 to 999: "number four seven one"."""
    return "number " + " ".join(NUMERALS[int(digit)] for digit in f"{number:03}")


# typefaces that come with matplotlib, in the order that FACE_SPLITS cuts
FACES = """
DejaVuSans DejaVuSans-Bold DejaVuSans-Oblique DejaVuSansMono DejaVuSansMono-Bold
DejaVuSansMono-Oblique DejaVuSansMono-BoldOblique DejaVuSerif DejaVuSerif-Bold DejaVuSerif-Italic
DejaVuSans-BoldOblique DejaVuSerif-BoldItalic
STIXGeneral STIXGeneralBol STIXGeneralItalic STIXGeneralBolIta
""".split()
FACE_SPLITS = {"train": slice(0, 10), "validation": slice(10, 12), "test": slice(12, 16)}
VALIDATION = "[\u0250-\u02ff\U00010300-\U0001032f]"  # phonetic and modifier letters, Old Italic
TRAIN = r". digit|. latin \w+ letter .$|. greek \w+ letter \w+$|[\u2190-\u21cf\u2200-\u223f]"
SIZE = 32  # of a card in pixels, both ways


def split_of(character):
    """ "train", "validation" or "test". Of the Latin letters with a diacritic one in ten validates
    and two test, by a checksum of the name, a capital and its small letter together."""
    name = unicodedata.name(character).lower()
    if re.fullmatch("latin (capital|small) letter [a-z] with .+", name):
        tenth = zlib.crc32(re.sub("capital|small", "", name).encode()) % 10
        return "validation" if tenth == 0 else "test" if tenth < 3 else "train"
    if re.match(VALIDATION, character):
        return "validation"
    return "train" if re.match(TRAIN, f"{character} {name}") else "test"


def render(text, font, height, width, baseline):
    """A bitmap (1, height, width) uint8 of a text that stands on the row `baseline`."""
    canvas = Image.new("L", (width, height))
    ImageDraw.Draw(canvas).text((width // 2, baseline), text, 255, font, anchor="ms")
    return TF.pil_to_tensor(canvas)


def draw_typefaces():
    """The characters that at least four of the typefaces have, without marks and spaces; bitmaps
    uint8 of them, glyphs (N, 16, 32, 32), and of number plates, (1000, 16, 9, 24)."""
    paths = [f"{get_data_path()}/fonts/ttf/{name}.ttf" for name in FACES]
    charmaps = [ft2font.FT2Font(path).get_charmap() for path in paths]
    characters = sorted(
        c
        for c in map(chr, charmaps[0])
        if sum(ord(c) in charmap for charmap in charmaps) >= 4
        and unicodedata.category(c)[0] not in "CMZ"
    )
    glyphs = torch.zeros(len(characters), len(FACES), SIZE, SIZE, dtype=torch.uint8)
    plates = torch.zeros(1000, len(FACES), 9, 24, dtype=torch.uint8)
    for face, path in enumerate(paths):
        # laid out the same with libraqm and without
        font = ImageFont.truetype(path, 22, layout_engine=ImageFont.Layout.BASIC)
        for i, character in enumerate(characters):
            if ord(character) in charmaps[face]:
                glyphs[i, face] = render(character, font, SIZE, SIZE, 23)
        small = font.font_variant(size=12)
        for number in range(1000):
            plates[number, face] = render(f"{number:03}", small, 9, 24, 9)
    return characters, glyphs, plates


class Cards:
    """The N characters of `draw_typefaces`, its glyphs and plates; names and splits (N,); has_glyph
    (N, 16): what a typeface draws; rows of characters: train (n,), validation, a list per task;
    tokens (n, L + 4) of the trained names, with room for number_tokens (1000, 4)."""

    def __init__(self, device):
        self.device = device
        self.characters, glyphs, plates = draw_typefaces()
        self.glyphs, self.plates = glyphs.to(device), plates.to(device)
        self.has_glyph = self.glyphs.amax((2, 3)) > 64  # some typefaces have it, and draw nothing
        self.names = [unicodedata.name(c).lower() for c in self.characters]
        self.splits = [*map(split_of, self.characters)]

        train, rows = self.rows_of("train", "train"), self.rows_of("validation", "validation")
        names, numbers = [self.names[i] for i in train], [*map(spell, range(1000))]
        self.vocabulary = build_vocabulary(names + numbers)
        self.about = f"{len(train)} characters, checksum {checksum(glyphs)}"
        self.train = torch.tensor(train, device=device)
        self.tokens = F.pad(tokenize(names, self.vocabulary), (0, 4)).to(device)
        self.number_tokens = tokenize(numbers, self.vocabulary).to(device)

        combinations = [
            i
            for i in rows
            if " with " in self.names[i]
            and self.vocabulary.keys() >= {*split_words(self.names[i])}  # all of them trained
        ]
        others = [i for i in rows if i not in combinations]
        self.validation = [combinations, others[:40], others[40:80], others[80:120]]

    def rows_of(self, split, faces):
        """The characters of a split that typefaces of another, or of the same, can draw."""
        drawn = self.has_glyph[:, FACE_SPLITS[faces]].any(1).tolist()
        return [i for i, found in enumerate(self.splits) if found == split and drawn[i]]

    def draw_batch(self, settings):
        """This process's part of a batch, from the random state: images (n, 1, 32, 32) and tokens
        (n, L), of "latin small letter a number four seven one" for example. No number comes twice;
        where a batch has more than 1,000 cards, each number has its share of them."""
        numbers = draw_different(1000, settings, self.device)
        chosen = integers(numbers, 0, len(self.train))
        images = draw_cards(self, self.train[chosen], numbers, "train")

        names = self.tokens[chosen]
        named = torch.rand(len(names), 1, device=self.device) < settings.number_share
        number_words = self.number_tokens[numbers].masked_fill(~named, 0)
        length = (names != 0).sum(1, keepdim=True)
        places = length + torch.arange(4, device=self.device)  # behind the name
        return images, names.scatter(1, places, number_words)

    @torch.no_grad()
    def validate(self, model):
        """Percent right of 16 cards of each validation character, in typefaces that neither train
        nor test: by the nearest class mean of k other cards; of combinations also zero-shot."""
        torch.manual_seed(0)
        characters = torch.tensor(list(chain(*self.validation)), device=self.device)
        rows = characters.repeat(32)  # 16 queries of each class, then 16 support images of each
        numbers = integers(rows, 0, 1000)
        x = embed_images(model, draw_cards(self, rows, numbers, "validation"))
        query, support = x.view(2, 16, len(characters), -1)
        combinations = [[self.names[i]] for i in self.validation[0]]  # the first characters
        classes = {"zero-shot": embed_classes(model, combinations)}
        classes |= {f"{k}-shot": F.normalize(support[:k].mean(0)) for k in (1, 4, 16)}
        labels = torch.arange(len(characters), device=self.device)
        return {
            name: percent_right(query[:, : len(P)] @ P.T, labels[: len(P)])
            for name, P in classes.items()
        }


def checksum(*tensors):
    """A number in which differences of the data show, for --resume."""
    total = 0
    for tensor in tensors:
        total = zlib.crc32(tensor.numpy(), total)
    return f"{total:08x}"


def percent_right(scores, labels):
    """scores (..., n, C), labels (n,) -> how often the highest score is that of the label."""
    return 100 * (scores.argmax(-1) == labels).float().mean().item()


def draw_different(n, settings, device):
    """A number below n for each place of this process's part of a batch. No two in the batch are
    equal while there are enough: process r of W takes its numbers from r, r + W, r + 2 W, ..."""
    count, own = settings.batch_size // world_size(), n // world_size()
    order = torch.randperm(max(count, own), device=device)[:count]
    return order % own * world_size() + rank()  # % repeats numbers where a batch needs more


def integers(x, low, high):
    """Random integers (n,) from low to high - 1, as many as x (n, ...) has rows, on its device."""
    return torch.randint(low, high, (len(x),), device=x.device)


def uniform(x, low, high):
    """Random numbers (n, 1, 1) from low to high, as many as x (n, ...) has rows, on its device."""
    return torch.empty(len(x), 1, 1, device=x.device).uniform_(low, high)


def draw_cards(cards, characters, numbers, split):
    """One card each: a character under a plate with a number, both in random typefaces of the
    split, in random shades, with noise. characters, rows of `cards`, and numbers from 0 to 999 (n,)
    -> images (n, 1, 32, 32) float32 in about [0, 1]."""
    faces = FACE_SPLITS[split]
    has_glyph = cards.has_glyph[characters, faces].float()
    random = torch.rand_like(has_glyph) * has_glyph  # 0 where the typeface lacks the character
    face = random.argmax(1) + faces.start
    glyphs = cards.glyphs[characters, face][:, None] / 255
    background, ink = uniform(glyphs, 0, 0.3), uniform(glyphs, 0.6, 1)
    images = torch.lerp(background[:, None], ink[:, None], warp(glyphs))
    lay_plates(images, cards, numbers, split, background, ink)
    inverted = uniform(images, 0, 1)[:, None] < 0.5
    return torch.where(inverted, 1 - images, images).add_(
        torch.empty_like(images).uniform_(-0.02, 0.02)
    )


def warp(glyphs):
    """Turn (up to 0.15 radians), shear (0.2), scale (0.8 to 1.6) and move (5 pixels) at random.
    glyphs (n, 1, 32, 32) -> the same."""
    angle, shear = uniform(glyphs, -0.15, 0.15), uniform(glyphs, -0.2, 0.2)
    scale = uniform(glyphs, 0.8, 1.6)
    right, down = uniform(glyphs, -10 / SIZE, 10 / SIZE), uniform(glyphs, -10 / SIZE, 10 / SIZE)
    cos, sin = angle.cos() / scale, angle.sin() / scale
    return resample(glyphs, cos, shear / scale - sin, right / scale, sin, cos, down / scale)


def resample(images, a, b, c, d, e, f):
    """images (n, C, S, S) -> the same: what is at x, y, from -1 to 1, was at a x + b y + c,
    d x + e y + f, each (n, 1, 1)."""
    S = images.shape[-1]
    x = torch.linspace(1 / S - 1, 1 - 1 / S, S, device=images.device)  # pixels' centres
    y = x[:, None]
    grid = torch.stack((a * x + b * y + c, d * x + e * y + f), 1).movedim(1, 3)
    return F.grid_sample(images, grid, align_corners=False)


def lay_plates(images, cards, numbers, split, background, ink):
    """Lay a plate of 24 x 9 pixels with its number over each image, near its top or bottom edge.
    images (n, 1, 32, 32), changed in place; numbers (n,); background, ink (n, 1, 1): the shades."""
    faces = FACE_SPLITS[split]
    face = integers(images, faces.start, faces.stop)
    offset, at_bottom = integers(images, 0, 4), integers(images, 0, 2)
    top = offset + 20 * at_bottom
    left = integers(images, 0, 9)
    windows = images.unfold(2, 9, 1).unfold(3, 24, 1)  # (n, 1, 24, 9, 9, 24), a view
    plates = torch.lerp(background, ink, cards.plates[numbers, face] / 255)
    windows[torch.arange(len(top), device=top.device), 0, top, left] = plates


# ---- 8. Captions and images of your own ----------------------------------------------------------
COLUMNS = [  # names of the image's and of the caption's; the first that is there counts
    "image image_name file_name filename filepath path".split(),
    "caption comment text title sentence".split(),
]


def read_table(path):
    """Yields (image's path, caption) of a table with a header; cells are separated by commas, tabs,
    semicolons or bars, images lie beside it or in one of its subfolders. The caption is empty where
    a row does not fit the header. Raises UserError, OSError."""
    csv.field_size_limit(1_000_000_000)
    first, *lines = re.split("(?<=\n)", path.read_text("utf-8-sig", "replace"))
    delimiter = max(",\t;|", key=first.count)
    header = [name.strip(' "\n').lower() for name in first.split(delimiter)]
    image, caption = ([header.index(n) for n in names if n in header] for names in COLUMNS)
    if not image or not caption:
        raise UserError(f"{path}: its first line does not name an image and a caption, {COLUMNS}")
    folders = [path.parent, *sorted(path.parent.glob("[!.]*/"))]

    def name_of(row):
        return (row + header)[image[0]].strip()

    # a cell in quotes may have several lines; but stray quotes swallow rows: then there are more
    # images where each line is read as a row
    in_cells = list(csv.reader(lines, delimiter=delimiter))
    by_line = [row for line in lines for row in csv.reader([line], delimiter=delimiter)]
    rows = max(in_cells, by_line, key=lambda rows: sum(is_image(Path(name_of(r))) for r in rows))
    for row in rows:
        if row:  # no empty line
            places = [folder / name_of(row) for folder in folders]
            found = next(filter(os.path.isfile, places), places[0])
            yield found, row[caption[0]] if len(row) == len(header) else ""


def is_image(path):
    """Whether a file's name ends as those of images do."""
    return path.suffix.lower() in datasets.folder.IMG_EXTENSIONS


def read_pairs(folder):
    """Yields (image's path, caption) of a folder: the captions of a.jpg are the lines of a.txt.
    What is hidden, or lies in a hidden folder, is passed over."""
    for path in sorted(folder.rglob("*.*")):
        if is_image(path) and "/." not in f"/{path.relative_to(folder).as_posix()}":
            text = path.with_suffix(".txt")
            captions = text.read_text("utf-8", "replace") if text.is_file() else ""
            yield from ((path, caption) for caption in captions.strip().split("\n"))


def read_captions(source):
    """[(image's path, caption)] of what --data names: a table, or a folder with one, or with pairs.
    Raises UserError, OSError."""
    tables = [*source.glob("[!.]*.[ct]sv"), *source.glob("captions.txt")]
    if not source.is_dir():
        tables = [source]
    if len(tables) == 1:
        pairs, problem = list(read_table(tables[0])), "no row of its table fits the header"
    else:
        pairs = list(read_pairs(source))
        problem = (
            f"it takes one table (captions.txt, a .csv, a .tsv), there are {len(tables)}, "
            "or pairs of an image and a .txt, there are none"
        )
    if not any(caption for _, caption in pairs):
        raise UserError(f"--data {source}: {problem}")
    return pairs


def preprocess(settings):
    """Returns a function that turns a PIL image into one for a model of these settings: its middle,
    (1, S, S) grey or, of photographs, (3, S, S), float32 in [0, 1], turned as its EXIF says,
    transparency laid on white. It raises in many ways, as Pillow does."""

    def read(image):
        image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":
            raise ValueError("16-bit and float images are not read")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
        image = image.convert("L" if settings.is_cards else "RGB")
        image = ImageOps.fit(image, [settings.image_size] * 2, Image.Resampling.BILINEAR)
        return TF.to_tensor(image)

    return read


def to_bytes(image):
    """An image in [0, 1] -> the same in uint8, a quarter of the memory."""
    return (255 * image).round().byte()


class Photos:
    """Images with their captions, each decoded once: images (N, 3, S, S) uint8, of which the first
    n train; tokens (M, L) of all captions, image by image, of which each image has counts (N,).
    Raises UserError, OSError."""

    def __init__(self, device, settings):
        self.device, source, fit = device, Path(settings.data), preprocess(settings)
        images, captions, bad = {}, {}, []
        for path, caption in tqdm(read_captions(source), disable=None):
            try:
                if not split_words(caption) or "\ufffd" in caption:
                    raise ValueError("no word, or no UTF-8, or its cells do not fit the header")
                if not path.is_file():  # a pipe would never end
                    raise FileNotFoundError("no such file")
                if path not in images:
                    images[path] = to_bytes(fit(Image.open(path)))
                captions.setdefault(path, []).append(caption)
            except Exception as error:
                bad.append(f"{path}: {error}"[:300])
        if bad:
            print(f"left out: {len(bad):,} captions, the first that of {bad[0]}")

        paths = sorted(
            images, key=lambda path: zlib.crc32(os.fsencode(os.path.relpath(path, source)))
        )
        self.n = max(len(paths) * 9 // 10, len(paths) - 1000)  # the others validate
        if self.n < settings.batch_size:
            raise UserError(f"--data {source}: {self.n} images to train on are less than a batch")
        pixels = torch.stack([images[path] for path in paths])
        texts = [text for path in paths for text in captions[path]]
        counts = torch.tensor([len(captions[path]) for path in paths])
        self.vocabulary = build_vocabulary(texts[: counts[: self.n].sum()], min_count=5)
        tokens = tokenize(texts, self.vocabulary)

        unknown = (tokens[tokens > 0] == 1).float().mean()
        long = sum(len(split_words(text)) > MAX_WORDS for text in texts)
        self.about = (
            f"{self.n:,} images and {len(paths) - self.n:,} held out, {len(self.vocabulary):,} "
            f"words, {unknown:.0%} unknown, {long:,} captions cut to {MAX_WORDS} words, "
            f"checksum {checksum(pixels, tokens, counts)}"
        )
        self.images = pixels.to(device)
        self.tokens = tokens.to(device)
        self.counts = counts.to(device)
        self.first = self.counts.cumsum(0) - self.counts  # caption of each image

    def draw_batch(self, settings):
        """This process's part of a batch: images (n, 3, S, S) in [0, 1] and tokens (n, L). No image
        comes twice, its captions would be false negatives. Of each one caption, and a square of
        half its area or more, mirrored half the time."""
        chosen = draw_different(self.n, settings, self.device)
        images = self.images[chosen] / 255
        random = uniform(images, 0, 1).flatten() * self.counts[chosen]
        caption = self.first[chosen] + random.long()
        side, mirror = uniform(images, 0.5, 1).sqrt(), uniform(images, -1, 1).sign()
        right = (1 - side) * uniform(images, -1, 1)
        down = (1 - side) * uniform(images, -1, 1)
        images = resample(images, side * mirror, 0, right, 0, side, down)
        return images, self.tokens[caption]

    @torch.no_grad()
    def validate(self, model):
        """Recall in percent on held-out images: of how many captions one of the k nearest images
        is right, its own or one that has the same caption."""
        x = embed_images(model, self.images[self.n :] / 255)
        owner = torch.repeat_interleave(self.counts[self.n :])  # the image of each caption (M,)
        captions, text = self.tokens[-len(owner) :].unique(dim=0, return_inverse=True)
        cosines = F.normalize(model.encode_text(captions)) @ x.T  # (distinct captions, images)
        right = torch.zeros_like(cosines, dtype=torch.bool)
        right[text, owner] = True
        hits = right.gather(1, cosines.topk(min(10, len(x))).indices)[text]  # (M, 10)
        return {
            f"R@{k}": 100 * hits[:, :k].any(1).float().mean().item()
            for k in (1, 5, 10)
            if k < len(x)  # of ten images one is always among the ten nearest
        }


# ---- 9. The command line -------------------------------------------------------------------------
def choose_device(cpu):
    """The accelerator if there is one, for each process its own, or else the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if cpu or not accelerator:
        return torch.device("cpu")
    torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", 0)))
    torch.set_float32_matmul_precision("high")  # TF32
    return accelerator


def run_program(parser, function, arguments):
    """function(the arguments); what the user can mend is one line and exit status 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # lines are seen at once, and ± is a ? at worst
        sys.stdout.reconfigure(line_buffering=True, errors="replace")
    args = parser.parse_args(arguments)
    try:
        function(args)
    except KeyboardInterrupt:
        advice = "; the same command with --resume goes on" if "resume" in args else ""
        parser.exit(130, f"stopped{advice}\n")
    except (UserError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        parser.error(" ".join(str(error).split()) or "out of memory")


def run(args):
    given = {name: getattr(args, name) for name in asdict(Settings())}
    runs = [Settings(**given | {"objective": name}) for name in args.objective.split(",")]
    for settings in runs:
        if not args.resume:
            check_free(args.out / f"{settings.objective}.pt")
    device = choose_device(args.cpu)
    if "WORLD_SIZE" in os.environ:  # torchrun: every batch is divided between its processes
        dist.init_process_group()
    if args.batch_size % world_size():
        raise UserError(
            f"--batch-size {args.batch_size}: not a multiple of {world_size()} processes"
        )
    if rank():
        sys.stdout = open(os.devnull, "w")

    args.out.mkdir(parents=True, exist_ok=True)
    data = Cards(device) if runs[0].is_cards else Photos(device, runs[0])
    for settings in runs:
        train(settings, data, args.out)
    print("next: python fewshot.py, with the same --out")
    if world_size() > 1:
        dist.destroy_process_group()


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="contextclip",
        description="Train baselines and context models. Settings and their defaults:",
        usage=argparse.SUPPRESS,  # an error is one line
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for each in fields(Settings):
        kind = {"type": each.type}
        if each.type is bool:
            kind = {"action": "store_true"}
        kind |= {"default": each.default, "help": each.metadata["help"]}
        parser.add_argument(f"--{each.name.replace('_', '-')}", **kind)
    parser.set_defaults(objective="clip,clixp")
    parser.add_argument("--cpu", action="store_true", help="use no accelerator")
    parser.add_argument("--out", type=Path, default="runs", help="folder of results")
    parser.add_argument("--resume", action="store_true", help="go on where this was interrupted")
    run_program(parser, run, arguments)


if __name__ == "__main__":
    main()
