"""ContextCLIP: context-aware multimodal pretraining, small enough to read in one sitting.

An open reimplementation of Roth, Akata, Damen, Balažević, Hénaff, "Context-Aware Multimodal Pretraining", CVPR 2025
(arXiv 2411.15099). The file follows the paper: 1 contrastive losses, 2 context, 3 encoders, 4 training, 5 data. A first
reading can end there; then come 6 devices and checkpoints, 7 large batches and several processes, 8 your own photographs and
torchvision's encoders, 9 the command line.

    python contextclip.py                      train the base model, then the context-aware one, and compare them
    python contextclip.py --objective siglixp  train one of clip, siglip, clixp, siglixp, or several: siglip,siglixp
    python contextclip.py --data DIR           train on photographs and captions of your own
    python contextclip.py --help               every setting

By default nothing is downloaded: the images are glyph cards, drawn from the typefaces that come with matplotlib, and their
captions are the Unicode names of the characters. On two CPU cores both models train in 5 to 8 minutes; with context 4-shot
accuracy is 47.6 % instead of 42.4 %, 16-shot 66.5 % instead of 62.8 % (validation tasks, prototypes, means of 5 seeds).
`python fewshot.py` then compares the models on 21 tasks, and figures/study.py holds the studies of the README.
"""

import argparse
import csv
import io
import math
import os
import re
import signal
import sys
import tempfile
import time
import unicodedata
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import distributed as dist
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from torchvision import models, transforms
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

FORMAT = "contextclip-2"  # of the checkpoints
IMAGE_SIZE = 32  # of a card, in pixels, both ways
MAX_WORDS = 32  # of a caption; more are cut off
SCALE_RANGE = (1.0, 100.0)  # of tau_1 and tau_2, clamped after every step
TAU_CTX_RANGE = (0.02, 2.0)  # of tau_ctx sqrt(d): below, one neighbour takes all; above, all images weigh the same

class UserError(ValueError):
    """A mistake of the user's: the command line prints it as one line and exits with status 2."""

def option(default, help, low=0, high=math.inf, step=1, choices=()):
    return field(default=default, metadata={"help": help, "low": low, "high": high, "step": step, "choices": choices})

@dataclass
class Settings:
    """All that decides what a run computes; every field is a flag, and checkpoints store them. Raises UserError."""

    objective: str = option("clip", "the loss, *xp with context; one or more of", choices=("clip", "siglip", "clixp", "siglixp"))
    data: str = option("", "train on the photographs and captions of this folder, see the README; else on cards")
    image_size: int = option(IMAGE_SIZE, "pixels that the encoder gets, both ways; a multiple of 8", 32, 224, 8)
    encoder: str = option("cnn", "of images: cnn, vit, or a classification model of torchvision, such as resnet18")
    pretrained: bool = option(False, "start from torchvision's weights for that encoder (it downloads them)")
    seed: int = option(0, "of the initial weights and of every batch")
    steps: int = option(1600, "optimiser steps", low=1)
    batch_size: int = option(512, "B; the other B - 1 images are an image's context", low=2)
    lr: float = option(2e-3, "peak learning rate of AdamW, between a linear warm-up and a cosine to 0")
    weight_decay: float = option(0.1, "of matrices; temperatures, biases and gains have none")
    width: int = option(64, "d, of the embeddings and the encoders; a multiple of 32", low=32, step=32)
    alpha: float = option(0.97, "weight of the plain loss; the context loss has 1 - alpha; the paper: 0.9", high=1)
    tau: float = option(5.0, "start of tau_1 and tau_2; CLIP's own is 1 / 0.07, SigLIP's 10", *SCALE_RANGE)
    tau_ctx: float = option(0.25, "start of tau_ctx sqrt(d); at 1 the attention is uniform", *TAU_CTX_RANGE)
    number_share: float = option(1.0, "share of captions that name the card's number", high=1)
    characters: int = option(250, "how many to train on, 0 for all; an image's context needs others of its kind")
    distortion: float = option(0.25, "how far cards are turned, shifted, shaded; at 1 the numbers are hard to read", high=1)
    precision: str = option("auto", "of the encoders (losses are float32):", choices=("auto", "float32", "bf16"))
    chunk: int = option(0, "losses in blocks of so many rows: memory grows as B x chunk; 0: all rows at once")
    no_mask: bool = option(False, "ablation: an image may attend to itself")
    shared_temperature: bool = option(False, "ablation: tau_1 (and b_1) serve the context loss too")
    detach_values: bool = option(False, "ablation: no gradient into the values V")
    normalize_values: bool = option(False, "ablation: normalised values V")

    sigmoid = property(lambda self: self.objective.startswith("sig"))
    context = property(lambda self: self.objective.endswith("xp"))

    def __post_init__(self):
        for f in fields(self):
            value, (_, low, high, step, choices) = getattr(self, f.name), f.metadata.values()
            if choices and value not in choices:
                raise UserError(f"{flag_of(f)} {value}: choose from {', '.join(choices)}")
            if f.type is not str and not low <= value <= high:
                raise UserError(f"{flag_of(f)} {value}: it must lie between {low} and {high}")
            if f.type is int and value % step:
                raise UserError(f"{flag_of(f)} {value}: it must be a multiple of {step}")
        if self.encoder not in ENCODERS and self.encoder not in models.list_models(models):
            raise UserError(f"--encoder {self.encoder}: neither cnn, nor vit, nor a classification model of torchvision")
        if self.pretrained and self.encoder in ENCODERS:
            raise UserError(f"--pretrained: there are no weights for --encoder {self.encoder}, only for torchvision's")

def flag_of(field):
    return "--" + field.name.replace("_", "-")

# ---- 1. Contrastive losses ------------------------------------------------------------------------------------------
# A term per image, (B,), in nats; their mean is the loss. `rows`: the terms of these images alone (for section 7).

def clip_loss(x, t, tau, rows=slice(None)):
    """Softmax contrastive loss, InfoNCE (Radford et al. 2021): logits s_ij = tau x_i.t_j, the mean of the cross-entropies
    over rows and over columns, targets the diagonal. x, t (B, d) normalised, paired by row."""
    i = torch.arange(len(x), device=x.device)[rows]
    return sum(F.cross_entropy(tau * a[rows] @ b.T, i, reduction="none") for a, b in ((x, t), (t, x))) / 2

def siglip_loss(x, t, tau, b, rows=slice(None)):
    """Sigmoid contrastive loss (Zhai et al. 2023): -(1/B) sum_ij log sigmoid(z_ij s_ij) with s_ij = tau x_i.t_j + b,
    z = +1 on the diagonal and -1 elsewhere. x, t (B, d) normalised, paired by row."""
    i = torch.arange(len(x), device=x.device)
    z = 2 * (i[rows, None] == i).to(x.dtype) - 1
    return -F.logsigmoid(z * (tau * x[rows] @ t.T + b)).sum(1)

def chance_loss(settings):
    """The loss, in nats, of a model that cannot tell pairs apart: ln B for the softmax; for the sigmoid that of its best
    constant logit, -ln(B - 1), about ln B + 1. A run whose loss stays here has learned nothing."""
    B = settings.batch_size
    return math.log(B) + ((B - 1) * math.log(B / (B - 1)) if settings.sigmoid else 0)

# ---- 2. Context -----------------------------------------------------------------------------------------------------

def attention(x, tau_ctx, mask=True, rows=slice(None)):
    """softmax_j( x_i.K_j / (tau_ctx sqrt(d)) ) with keys K = x: how much of image j goes into the context of image i.

    x (B, d) normalised -> (B, B), or some rows of it, each with sum 1; with `mask` the diagonal is 0: an image is rebuilt
    from the others.
    """
    scores, everyone = x[rows] @ x.T / (tau_ctx * x.shape[1] ** 0.5), torch.arange(len(x), device=x.device)
    if mask:
        scores = scores.masked_fill(everyone[rows, None] == everyone, -math.inf)
    return scores.softmax(dim=1)

def contextualize(v, tau_ctx, mask=True, detach_values=False, normalize_values=False, rows=slice(None)):
    """x_ctx_i = softmax_j( x_i.K_j / (tau_ctx sqrt(d)) ) V, j != i: every image rebuilt by attention over the others.

    v (B, d) raw image embeddings -> x_ctx (B, d), or some rows of it, not normalised. Keys are the normalised embeddings,
    values the raw ones; gradients flow through queries, keys and values. The three switches are the paper's ablations.
    """
    x = F.normalize(v, dim=1)
    values = x if normalize_values else v
    return attention(x, tau_ctx, mask, rows) @ (values.detach() if detach_values else values)

def lixp_loss(v, t, model, settings):
    """L_LIxP = alpha L(X, T; tau_1) + (1 - alpha) L(X_ctx, T; tau_2); the base objectives are L(X, T; tau_1) alone.

    v, t (B, d) raw image and text embeddings, in any precision; `model` holds the temperatures. Returns (3,) nats:
    the loss, its plain and its context term (0 where there is none); of several processes, the means over its own rows.
    """
    v, t = gather(v.float()), gather(F.normalize(t.float(), dim=1))  # with one process they stay as they are
    in_blocks = partial(by_rows, settings.chunk)

    def loss(x, log_tau, b):
        x = F.normalize(x, dim=1)  # of x_ctx as well: our reading
        if settings.sigmoid:
            return in_blocks(siglip_loss, x, t, log_tau.exp(), b).mean()
        return in_blocks(clip_loss, x, t, log_tau.exp()).mean()

    plain = loss(v, model.log_tau_1, model.b_1)
    if not settings.context:
        return torch.stack((plain, plain, torch.zeros_like(plain)))
    switches = not settings.no_mask, settings.detach_values, settings.normalize_values
    x_ctx = gather(in_blocks(contextualize, v, model.log_tau_ctx.exp(), *switches))
    context = loss(x_ctx, *((model.log_tau_1, model.b_1) if settings.shared_temperature else (model.log_tau_2, model.b_2)))
    return torch.stack((settings.alpha * plain + (1 - settings.alpha) * context, plain, context))

# ---- 3. Encoders ----------------------------------------------------------------------------------------------------

def transformer(width, depth):
    layer = nn.TransformerEncoderLayer(width, width // 32, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, depth, norm=nn.LayerNorm(width), enable_nested_tensor=False)

def cnn(width, channels, size):
    """(B, channels, size, size) -> (B, d). No batch norm: an embedding depends on its image alone, context enters by the
    loss. No pooling: it would lose the order of the digits."""

    def block(inputs, outputs, stride):
        return nn.GroupNorm(1, inputs), nn.ReLU(), nn.Conv2d(inputs, outputs, 3, stride, padding=1)

    half, side = width // 2, size // 4
    layers, inputs = [nn.Conv2d(channels, half, 4, stride=4), *block(half, half, 1)], half
    while side > 4:  # (B, d/2, 8, 8) of a card becomes (B, d, 4, 4)
        layers += *block(inputs, width, 2), *block(width, width, 1)
        inputs, side = width, (side + 1) // 2
    return nn.Sequential(*layers, nn.GroupNorm(1, width), nn.ReLU(), nn.Flatten(), nn.Linear(width * side**2, width))

def vit(width, channels, size):
    """(B, channels, size, size) -> (B, d): torchvision's, on patches of 8 x 8 pixels and a class token, four layers deep."""
    model = models.VisionTransformer(size, 8, 4, width // 32, width, 4 * width, num_classes=width)
    model.conv_proj = nn.Conv2d(channels, width, 8, stride=8)
    nn.init.normal_(model.heads.head.weight, std=width**-0.5)  # its own start, zero, cannot be normalised
    return model

ENCODERS = {"cnn": cnn, "vit": vit}

class ContextCLIP(nn.Module):
    """The image encoder, the text encoder, and the temperatures and biases of the losses. Every objective has the same
    parameters, drawn in the same order: one seed gives the same initial weights."""

    def __init__(self, settings, vocabulary):
        super().__init__()
        width = settings.width
        self.settings, self.vocabulary = settings, vocabulary
        own = ENCODERS.get(settings.encoder)  # torchvision's take three channels, grey or not
        self.channels = 1 if own and not settings.data else 3
        self.image_encoder = (own(width, self.channels, settings.image_size) if own else
                              backbone(settings.encoder, width, settings.image_size, settings.pretrained))  # fmt: skip
        self.words = nn.Embedding(len(vocabulary), width, padding_idx=0)
        self.positions = nn.Parameter(0.02 * torch.randn(MAX_WORDS, width))
        self.text_encoder, self.text_head = transformer(width, depth=1), nn.Linear(width, width)
        log_tau, log_tau_ctx = math.log(settings.tau), math.log(settings.tau_ctx / width**0.5)
        b = -math.log(settings.batch_size - 1) if settings.sigmoid else 0.0  # SigLIP's -10 suits batches of 32,768
        start = {"log_tau_1": log_tau, "log_tau_2": log_tau, "b_1": b, "b_2": b, "log_tau_ctx": log_tau_ctx}
        for name, value in start.items():
            setattr(self, name, nn.Parameter(torch.tensor(value)))

    def encode_image(self, images, normalize=False):
        """images (B, 1 or 3, S, S) in about [0, 1], of another size than --image-size resized -> v (B, d), with `normalize`
        of length 1 and float32."""
        if images.shape[-1] != self.settings.image_size:
            images = F.interpolate(images, self.settings.image_size, mode="bilinear", antialias=True)
        images = images.expand(-1, self.channels, -1, -1).contiguous(memory_format=torch.channels_last)
        v = self.image_encoder(4 * (images - 0.5))
        return F.normalize(v.float(), dim=1) if normalize else v

    def encode_text(self, tokens, normalize=False):
        """tokens (B, L) from `tokenize` -> t (B, d), with `normalize` of length 1 and float32."""
        padding = tokens == 0
        h = self.words(tokens) + self.positions[: tokens.shape[1]]
        h = self.text_encoder(h, src_key_padding_mask=padding).masked_fill(padding[..., None], 0)
        t = self.text_head(h.sum(1) / (~padding).sum(1, keepdim=True))  # the mean over the words
        return F.normalize(t.float(), dim=1) if normalize else t

    def forward(self, images, tokens):
        return self.encode_image(images), self.encode_text(tokens)

    def temperatures(self):
        """[tau_1, tau_2, tau_ctx sqrt(d), b_1, b_2] as numbers; waits for the device."""
        tau = torch.stack((self.log_tau_1, self.log_tau_2, self.log_tau_ctx + math.log(self.settings.width) / 2)).exp()
        return torch.cat((tau, torch.stack((self.b_1, self.b_2)))).tolist()

    @torch.no_grad()
    def clamp_temperatures(self):
        self.log_tau_1.clamp_(*map(math.log, SCALE_RANGE))
        self.log_tau_2.clamp_(*map(math.log, SCALE_RANGE))
        self.log_tau_ctx.clamp_(*(math.log(tau / self.settings.width**0.5) for tau in TAU_CTX_RANGE))

def split_words(caption):
    return re.findall(r"[\w-]+", caption.lower())

def build_vocabulary(captions, least=1):
    """{word: token} of the words that come `least` times: 0 is padding, 1 any other word, the rest in alphabetical order."""
    counts = Counter(word for caption in captions for word in split_words(caption))
    return {word: i for i, word in enumerate(["<pad>", "<unk>", *sorted(w for w in counts if counts[w] >= least)])}

def tokenize(captions, vocabulary):
    """N captions -> tokens (N, L) int64, L the longest, cut at MAX_WORDS; an empty caption is one unknown word."""
    rows = [torch.tensor([vocabulary.get(w, 1) for w in split_words(c)[:MAX_WORDS]] or [1]) for c in captions]
    return pad_sequence(rows, batch_first=True)

# ---- 4. Training ----------------------------------------------------------------------------------------------------

LOG_EVERY, SAVE_EVERY = 10, 100  # steps; the loop waits for the device only to log, and saves only what it has logged
COLUMNS = "step loss plain_loss context_loss tau_1 tau_2 tau_ctx_sqrt_d b_1 b_2 images_per_second".split()

def make_optimizer(model, settings):
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]  # temperatures, biases, gains
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.98), fused=True)

def training_step(model, forward, optimizer, images, tokens, lr, bf16):
    """One update; `forward` is the model or its compiled form. Returns `lixp_loss`'s three numbers, on the device."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
        v, t = forward(images, tokens)
    losses = lixp_loss(v, t, model, model.settings)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad()
    losses[0].backward()
    average_gradients(model)
    optimizer.step()
    model.clamp_temperatures()
    return losses.detach()

def train(settings, data, out, resume=False, init=None, compile=False, watch=None):
    """Train one model on the device of `data`, an Atlas or Photos, from the weights of `init` (a checkpoint's content) if
    given; write out/<objective>.pt and .csv; call `watch(step, model)` at every line of the log. Returns the row of the
    final table. Raises UserError; Ctrl-C exits after saving.

    Weights and batches come from settings.seed by two generators from which no objective draws: two objectives with one
    seed start from the same weights and see the same batches.
    """
    device, path, steps, B = data.device, out / f"{settings.objective}.pt", settings.steps, settings.batch_size
    torch.manual_seed(settings.seed)
    model, generator = ContextCLIP(settings, data.vocabulary), torch.Generator(data.train.device).manual_seed(settings.seed)
    log, seconds, saved = [], 0.0, read_checkpoint(path) if resume and path.exists() else None
    if saved:
        check_same_run(saved, path, settings, data)
        if saved["result"]:
            return saved["result"]
        log, seconds = saved["log"], saved["seconds"]
        model.load_state_dict(saved["model"])
        generator.set_state(saved["random"]["batches"])
        torch.set_rng_state(saved["random"]["torch"])
    elif init:
        initialize(model, init)
    model.to(device, memory_format=torch.channels_last)
    optimizer, bf16 = make_optimizer(model, settings), use_bf16(settings, device)
    if saved:
        optimizer.load_state_dict(saved["optimizer"])
    elif path.exists() and not rank():  # an earlier run is not lost
        path.replace(path.with_name(path.name + ".bak"))
    start, chance, warmup = log[-1][0] if log else 0, chance_loss(settings), max(1, steps // 20)
    print(f"{settings.objective}: {device}, {'bf16' if bf16 else 'float32'}, "
          f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(data.train):,} {data.kind}, {steps} steps of {B}"
          f"{f', in {processes()} processes' * (processes() > 1)}; chance-level loss {chance:.3f}")  # fmt: skip
    if processes() > 1 and device.type == "cuda":  # batch norm of torchvision's encoders, over the whole batch
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if compile:
        torch._dynamo.config.suppress_errors = True  # where compiling fails, it goes on with the plain model
    forward = torch.compile(model) if compile else model

    def save(result=None):
        random = {"device": device.type, "batches": generator.get_state(), "torch": torch.get_rng_state()}
        write_checkpoint(path, {"format": FORMAT, "settings": asdict(settings), "vocabulary": list(data.vocabulary), "log": log,
                                "seconds": seconds, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                                "random": random, "result": result})  # fmt: skip

    stopped = []  # by Ctrl-C or kill: go on to the next log line, save, return
    handlers = {s: signal.signal(s, lambda *_: stopped.append(True)) for s in (signal.SIGINT, signal.SIGTERM)}
    bar = tqdm(range(start + 1, steps + 1), settings.objective, steps, initial=start, unit="step", disable=rank() > 0)
    losses, logged, begin, own = torch.zeros(3, device=device), start, time.perf_counter(), share(B)
    try:
        for step in bar:
            images, tokens = data.draw_batch(settings, generator)
            lr = settings.lr * min(step / warmup, (1 + math.cos(math.pi * (step - 1) / steps)) / 2)
            losses += training_step(model, forward, optimizer, images[own], tokens[own], lr, bf16)
            if step % LOG_EVERY and step < steps:
                continue
            *mean, stop = mean_over_processes(torch.cat((losses / (step - logged), losses.new_tensor([len(stopped)])))).tolist()
            if not math.isfinite(mean[0]) or not nn.utils.get_total_norm(model.parameters()).isfinite():
                kept = f"{path} keeps the last good step" if path.exists() else "nothing was saved yet"
                raise UserError(f"the loss is no longer finite at step {step}: {kept}; try a lower --lr")
            elapsed, begin = time.perf_counter() - begin, time.perf_counter()
            seconds += elapsed
            log.append([step, *mean, *model.temperatures(), (step - logged) * B / elapsed])
            shown = "loss {1:.3f}, tau_1 {4:.1f}, tau_2 {5:.1f}, tau_ctx*sqrt(d) {6:.3f}, {9:,.0f} images/s"
            bar.set_postfix_str(shown.format(*log[-1]))
            if watch:
                watch(step, model)
                begin = time.perf_counter()
            if logged < steps / 10 <= step and steps >= SAVE_EVERY and mean[1] > 0.98 * chance:
                bar.write(f"warning: a tenth of the run is over, and the loss, {mean[1]:.3f}, is still at chance")
            losses, logged = torch.zeros_like(losses), step
            if step < steps and (stop or step % SAVE_EVERY == 0):
                save()
            if stop and step < steps:
                command = " ".join(["python", *sys.argv, *["--resume"] * ("--resume" not in sys.argv)])
                print(f"stopped at step {step} and saved; to go on: {command}", file=sys.stdout if rank() else sys.stderr)
                raise SystemExit(130)
    finally:
        bar.close()
        for number, handler in handlers.items():
            signal.signal(number, handler)
    result = {"objective": settings.objective, "loss": mean[0], **data.validate(model.eval()), "seconds": seconds,
              "images/s": steps * B / seconds}  # fmt: skip
    save(result)
    return result

# ---- 5. Data: glyph cards -------------------------------------------------------------------------------------------

GLYPH_HEIGHT = 23  # pixels of the card for the glyph, 17 per em, the baseline in row 18; the number is below
FACES = {  # typefaces that come with matplotlib, by what they are for: a group draws nothing else
    "train": ["DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSansMono-Bold",
              "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic"],
    "validation": ["DejaVuSans-BoldOblique", "DejaVuSerif-BoldItalic"],
    "test": ["STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"],
}  # fmt: skip
VALIDATION = {"phonetic letters": (0x250, 0x2B0), "modifier letters": (0x2B0, 0x300), "old italic": (0x10300, 0x10330)}
TRAINED = re.compile(r"digit \w+|latin (capital|small) letter [a-z]( with .+)?|greek (capital|small) letter \w+")
NUMERALS = "zero one two three four five six seven eight nine".split()

def split_of(character):
    """Which split a character belongs to: 'train', 'test', or the name of a validation task. Of the Latin letters with a
    diacritic one in ten validates and two in ten test, capital and small letter alike; the other scripts test."""
    code, name = ord(character), unicodedata.name(character).lower()
    for task, (first, last) in VALIDATION.items():
        if first <= code < last:
            return task
    if name.startswith("latin") and TRAINED.fullmatch(name) and " with " in name:
        tenth = zlib.crc32(re.sub("capital|small", "", name).encode()) % 10
        return "combinations" if tenth == 0 else "test" if tenth < 3 else "train"
    return "train" if TRAINED.fullmatch(name) or 0x2190 <= code < 0x21D0 or 0x2200 <= code < 0x2240 else "test"

class Atlas:
    """Cards. Every character that at least four of the typefaces draw, rendered once per typeface: N characters, G bitmaps.

    names: N captions. index: {character: number}. glyphs (G, 23, 32) uint8. rows[group] (N, 2): a character's first bitmap
    in a group of FACES, and how many it has there. train: numbers of the training characters, as many as the settings say,
    plain letters and symbols before combinations. validation: {task: numbers, at most 64}. vocabulary: of the training
    captions. words (N, L + 4): tokens of the names, with room for a card's number.
    """

    kind = "characters"

    def __init__(self, device, settings):
        self.device, self.distortion, self.number_share = torch.device(device), settings.distortion, settings.number_share
        drawn, typefaces = Counter(), {group: [] for group in FACES}
        for group, name in ((group, name) for group in FACES for name in FACES[group]):
            path = f"{matplotlib.get_data_path()}/fonts/ttf/{name}.ttf"
            font = ImageFont.truetype(path, 17, layout_engine=ImageFont.Layout.BASIC)  # the same with and without libraqm
            typefaces[group].append((font, set(FT2Font(path).get_charmap())))
            drawn.update(typefaces[group][-1][1])

        def render(code, font):
            canvas = Image.new("L", (IMAGE_SIZE, GLYPH_HEIGHT))
            ImageDraw.Draw(canvas).text((IMAGE_SIZE / 2, 18), chr(code), fill=255, font=font, anchor="ms")
            return np.array(canvas)

        characters, glyphs, rows = [], [], {group: [] for group in FACES}
        for code in tqdm(sorted(c for c in drawn if drawn[c] >= 4), "drawing glyphs", leave=False, disable=rank() > 0):
            if unicodedata.category(chr(code))[0] in "CMZ" or not unicodedata.name(chr(code), ""):
                continue  # control characters, combining marks, separators
            characters.append(chr(code))
            for group in FACES:
                bitmaps = [render(code, font) for font, covered in typefaces[group] if code in covered]
                bitmaps = [b for b in bitmaps if b.max() > 64]  # some faces draw nothing
                rows[group].append((len(glyphs), len(bitmaps)))
                glyphs += bitmaps
        self.names = [unicodedata.name(c).lower() for c in characters]
        self.index = {c: i for i, c in enumerate(characters)}
        self.glyphs = torch.from_numpy(np.stack(glyphs)).to(device)
        self.rows = {group: torch.tensor(row, device=device) for group, row in rows.items()}

        splits = [split_of(c) for c in characters]

        def members(split, group):  # those that a typeface of the group draws
            return [i for i, s in enumerate(splits) if s == split and rows[group][i][1]]

        train = sorted(members("train", "train"), key=lambda i: (" with " in self.names[i], zlib.crc32(self.names[i].encode())))
        train = train[: settings.characters or None]
        self.train = torch.tensor(train, device=device)
        self.vocabulary = build_vocabulary([self.names[i] for i in train] + NUMERALS + ["number"])
        self.validation = {}
        for task in ("combinations", *VALIDATION):  # combinations of a letter and a diacritic that are trained apart
            classes = [i for i in members(task, "validation") if task in VALIDATION or self.knows(i)]
            if classes:  # every second, third, ... of them, so that they are 64 at most
                self.validation[task] = torch.tensor(classes[:: -(-len(classes) // 64)], device=device)
        self.words = F.pad(tokenize(self.names, self.vocabulary), (0, 4)).to(device)
        self.longest = int((self.words[self.train] != 0).sum(1).max()) + 4  # words of a training caption
        self.numerals = torch.tensor([self.vocabulary[w] for w in NUMERALS], device=device)

    def knows(self, character):
        """Whether all words of its name were trained."""
        return set(split_words(self.names[character])) <= self.vocabulary.keys()

    def prompts(self, character):
        """Ten captions of a character, as in training: its name, and in a share of them a number, so that every digit comes
        once in every place. Their mean embedding stands for the class (prompt ensembling, Radford et al. 2021)."""
        numbers = [" ".join(NUMERALS[(i + shift) % 10] for shift in (0, 3, 6)) for i in range(10)]
        return [self.names[character] + f", number {n}" * (i < 10 * self.number_share) for i, n in enumerate(numbers)]

    def draw_batch(self, settings, generator):
        """One training batch: images (B, 1, 32, 32), tokens (B, L) of "latin small letter a, number four seven one"."""
        B, device = settings.batch_size, self.device
        characters = self.train[torch.randint(len(self.train), (B,), device=device, generator=generator)]
        images, numbers = draw_cards(self, characters, "train", generator)
        number = F.pad(self.numerals[numbers], (1, 0), value=self.vocabulary["number"])  # (B, 4)
        named = torch.rand(B, 1, device=device, generator=generator) < settings.number_share
        words = self.words[characters, : self.longest]
        end = (words != 0).sum(1, keepdim=True) + torch.arange(4, device=device)
        return images, words.scatter(1, end, number * named)

    @torch.no_grad()
    def validate(self, model, shots=(1, 4, 16), queries=16, seed=0):
        """Accuracy in percent on the validation tasks, cards of characters and typefaces used for nothing else: prototypes
        of k images per class, mean over the tasks, and zero-shot on the combinations (other names have unknown words).

        Supports are nested, queries the same for every k. Returns {"zero-shot": ..., k: ..., "tasks": {task: {k: ...}}}.
        """
        tasks, zero_shot = {}, math.nan
        for task, members in self.validation.items():
            generator, C = torch.Generator(self.device).manual_seed(seed), len(members)
            images, _ = draw_cards(self, members.repeat(max(shots) + queries), "validation", generator)
            x = torch.cat([model.encode_image(part, normalize=True) for part in images.split(1024)]).unflatten(0, (-1, C))
            labels = torch.arange(C, device=self.device)

            def accuracy(classes):  # (C, d)
                return 100 * ((x[max(shots) :] @ classes.T).argmax(-1) == labels).float().mean().item()

            tasks[task] = {k: accuracy(prototypes(x[:k].flatten(0, 1), labels.repeat(k), C)) for k in shots}
            if task == "combinations":
                tokens = tokenize([p for i in members.tolist() for p in self.prompts(i)], model.vocabulary).to(self.device)
                t = model.encode_text(tokens, normalize=True).unflatten(0, (C, -1)).mean(1)
                zero_shot = accuracy(F.normalize(t, dim=-1))
        return {"zero-shot": zero_shot, **{k: np.mean([t[k] for t in tasks.values()]).item() for k in shots}, "tasks": tasks}

    def report(self, results):
        """Print the table of `train`'s results."""
        print("\nobjective    loss  zero-shot  1-shot  4-shot  16-shot  seconds  images/s")
        for r in results:
            print("{objective:9}{loss:8.3f}{zero-shot:11.1f}".format(**r), end="")
            print(f"{r[1]:8.1f}{r[4]:8.1f}{r[16]:9.1f}{r['seconds']:9.0f}{r['images/s']:10,.0f}")
        print(f"accuracy in % on cards of characters and typefaces never trained: {', '.join(self.validation)};\n"
              "few-shot by prototypes, mean over these tasks; zero-shot on the combinations; next: python fewshot.py")  # fmt: skip

def draw_cards(atlas, characters, group, generator):
    """Draw one card each: the character above a random three-digit number, both in random typefaces of `group`, in random
    shades, and, as far as atlas.distortion says, turned, sheared (0.2 radians, 0.2), shrunk (1 / 1.2), shifted (2 pixels),
    with a shaded ground and noise. Everything happens on the atlas's device.

    characters (B,) int64 -> images (B, 1, 32, 32) float32 in about [0, 1], numbers (B, 3) digits int64.
    """
    B, device, far = len(characters), characters.device, atlas.distortion

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(B, *shape, device=device, generator=generator)

    first, count = atlas.rows[group][characters].unbind(1)
    glyphs = atlas.glyphs[first + (uniform(0, 1) * count).long()]
    numbers = torch.randint(10, (B, 3), device=device, generator=generator)
    first, count = atlas.rows[group][numbers + atlas.index["0"]].unbind(2)  # (B, 3)
    digits = atlas.glyphs[first + (uniform(0, 1, 1) * count).long()]  # one typeface for the three
    digits = F.adaptive_avg_pool2d(digits[:, :, 5:19, 10:22].float(), (9, 8))  # two thirds the size
    card = torch.zeros(B, 1, IMAGE_SIZE, IMAGE_SIZE, device=device)
    card[:, 0, :GLYPH_HEIGHT] = glyphs
    card[:, 0, GLYPH_HEIGHT:, 4:28] = digits.transpose(1, 2).flatten(2)

    angle, shear, scale = 0.2 * far * uniform(-1, 1), 0.2 * far * uniform(-1, 1), 1 + 0.2 * far * uniform(0, 1)
    cos, sin, shift = scale * angle.cos(), scale * angle.sin(), 0.12 * far * uniform(-1, 1, 2)  # shift in half cards
    theta = torch.stack((cos, shear - sin, shift[:, 0], sin, cos, shift[:, 1]), 1).view(B, 2, 3)
    ink = F.grid_sample(card / 255, F.affine_grid(theta, card.shape, align_corners=False), align_corners=False)

    dark, light, polarity = uniform(0.0, 0.3, 1, 1, 1), uniform(0.6, 1.0, 1, 1, 1), uniform(0, 1, 1, 1, 1) < 0.5
    paper, pen = torch.where(polarity, light, dark), torch.where(polarity, dark, light)
    ramp = torch.linspace(-1, 1, IMAGE_SIZE, device=device)
    shade = 0.1 * (uniform(-1, 1, 1, 1, 1) * ramp + uniform(-1, 1, 1, 1, 1) * ramp[:, None])
    noise = 0.05 * torch.randn(card.shape, device=device, generator=generator)
    return torch.lerp(paper, pen, ink) + far * (shade + noise), numbers

def prototypes(support, labels, classes):
    """Class means of a support, normalised again. support (S, d) normalised, labels (S,) -> P (classes, d)."""
    return F.normalize(F.one_hot(labels, classes).to(support).T @ support, dim=-1)

# ---- 6. Devices and checkpoints --------------------------------------------------------------------------------------

def choose_device(name="auto"):
    """A torch device that works, with its global switches set. Raises UserError."""
    if name in ("auto", "cuda") and "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.zeros(1, device=name).device
        if device.type == "cuda":
            torch.cuda.set_device(device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"--device {name}: there is no such device here") from None
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.enable_flash_sdp(device.type != "cpu")  # the CPU's is three times slower on short captions
    torch.backends.mha.set_fastpath_enabled(False)  # evaluate with the kernels that trained
    return device

def use_bf16(settings, device):
    """Whether the encoders run in bf16: where the hardware multiplies it; elsewhere it is slower than float32."""
    if settings.precision != "auto":
        return settings.precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    features = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    return bool(features.get("avx512_bf16") or features.get("amx_bf16"))

def preprocess(settings):
    """PIL image -> (1, S, S) grey or, for a model of photographs, (3, S, S), float32 in [0, 1]: what a model is to be given."""
    fit = transforms.Resize(settings.image_size), transforms.CenterCrop(settings.image_size), transforms.ToTensor()
    return transforms.Compose([transforms.Lambda(lambda image: image.convert("RGB" if settings.data else "L")), *fit])

def read_checkpoint(path):
    """The dictionary that `train` saved. Raises UserError where there is none, or one of another version."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        version = content["format"]
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}: python contextclip.py trains some") from None
    except Exception:  # torch.load has many ways to fail
        raise UserError(f"{path} is not a checkpoint of contextclip") from None
    if version != FORMAT:
        raise UserError(f"{path} was written by another version of contextclip ({version}; this one reads {FORMAT})")
    return content

def load(path, device="cpu"):
    """A trained model for use, with its `vocabulary` for `tokenize`. Raises UserError if `path` is no checkpoint."""
    content = read_checkpoint(path)
    settings = replace(Settings(**content["settings"]), pretrained=False)  # the weights are here
    model = ContextCLIP(settings, {word: i for i, word in enumerate(content["vocabulary"])})
    model.load_state_dict(content["model"])
    return model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)

def initialize(model, source):
    """Post-training: start from the weights of a checkpoint's content; a base model's tau_1 and b_1 start both losses.
    Raises UserError if they do not fit."""
    weights, settings, own = source["model"], Settings(**source["settings"]), model.state_dict()
    kinds = [(s.encoder, s.width, s.image_size, bool(s.data), s.sigmoid) for s in (settings, model.settings)]
    if kinds[0] != kinds[1] or source["vocabulary"] != list(model.vocabulary):
        raise UserError("--init: that model's encoder, width, image size, vocabulary or kind of loss is not this run's")
    if not settings.context:
        weights = weights | {"log_tau_2": weights["log_tau_1"], "b_2": weights["b_1"], "log_tau_ctx": own["log_tau_ctx"]}
    model.load_state_dict(weights)

def check_same_run(saved, path, settings, data):
    """Raises UserError if a checkpoint's content is not of a run with these settings, on this kind of device."""
    before = asdict(Settings(**saved["settings"])) | {"device": saved["random"]["device"]}
    for name, new in (asdict(settings) | {"device": data.device.type}).items():
        if before[name] != new:
            raise UserError(f"--resume: {path} was made with {name} = {before[name]}, this run has {new}")
    if saved["vocabulary"] != list(data.vocabulary):
        raise UserError(f"--resume: the captions of {settings.data or 'the cards'} are not those of {path}")

def write_checkpoint(path, content):
    """To a temporary file, then renamed: `path` is always a whole checkpoint, the old one or the new one. And the log, beside
    it. Raises UserError."""
    temporary = path.with_suffix(".tmp")
    try:
        if not rank():
            torch.save(content, temporary)
            os.replace(temporary, path)
            with open(path.with_suffix(".csv"), "w", newline="") as file:
                csv.writer(file).writerows([COLUMNS, *content["log"]])
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path} ({error})") from None

# ---- 7. Large batches, several processes ----------------------------------------------------------------------------
# A process computes the losses of its own share of the batch's rows, in blocks if need be.

def rank():
    return dist.get_rank() if dist.is_initialized() else 0

def processes():
    return dist.get_world_size() if dist.is_initialized() else 1

def share(B):
    """This process's rows of a batch."""
    return slice(rank() * B // processes(), (rank() + 1) * B // processes())

def by_rows(chunk, function, *tensors):
    """function(*tensors, rows=...) of this process's share of the rows; with `chunk` in blocks of so many, each computed
    again in the backward pass: no B x B matrix is kept."""
    own = share(len(tensors[0]))
    if not chunk:
        return function(*tensors, rows=own)
    blocks = [slice(i, min(i + chunk, own.stop)) for i in range(own.start, own.stop, chunk)]
    return torch.cat([checkpoint(function, *tensors, rows=block, use_reentrant=False) for block in blocks])

class Gather(torch.autograd.Function):
    """A process's rows -> those of all processes, in order of rank; backward, the sum of what all of them send here."""

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(processes())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone(memory_format=torch.contiguous_format)  # all_reduce overwrites it
        dist.all_reduce(gradient)
        return gradient[share(len(gradient))]

def gather(x):
    return Gather.apply(x) if dist.is_initialized() else x

def mean_over_processes(values):
    if dist.is_initialized():
        dist.all_reduce(values)
    return values / processes()

def average_gradients(model):
    """Each process's loss is the mean over its rows: the mean of their gradients is that of the whole batch."""
    if dist.is_initialized():
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        mean = mean_over_processes(torch.cat([g.flatten() for g in gradients]))
        for gradient, part in zip(gradients, mean.split([g.numel() for g in gradients])):
            gradient.copy_(part.view_as(gradient))

def join_processes(device):
    """Under torchrun, join the others; the batch is divided between them. Returns their store, else None."""
    if "RANK" not in os.environ:
        return None
    store, number, size = next(dist.rendezvous("env://"))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=number, world_size=size)
    return store

# ---- 8. Your own photographs, torchvision's encoders -----------------------------------------------------------------

LEAST_COUNT = 5  # of a word in the training captions; rarer ones are unknown (as Karpathy and Fei-Fei 2015 have it)

def read_text(path):
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8, from byte {error.start} on") from None

def read_captions(folder):
    """[(image's path, caption, where it stands)] of a folder with captions.txt, as Flickr8k and Flickr30k have it, and the
    images beside it or in a folder Images; or of a folder with pairs name.jpg, name.txt, a caption per line. And [the bad
    rows, one message each]. Raises UserError."""
    table, found, bad = folder / "captions.txt", [], []
    if table.exists():
        home = next((p for p in map(folder.joinpath, ("Images", "images", "flickr30k_images")) if p.is_dir()), folder)
        first, *lines = list(csv.reader(io.StringIO(read_text(table), newline=""))) or [[]]
        if [name.strip() for name in first] != ["image", "caption"]:
            raise UserError(f"{table}: its first line must be image,caption")
        rows = [(home / line[0], line[1:], f"{table}, row {i}") for i, line in enumerate(lines, 2) if line]
    elif folder.is_dir():
        images = {p.with_suffix(""): p for p in sorted(folder.rglob("*")) if p.suffix.lower() in IMG_EXTENSIONS}
        texts = {p.with_suffix(""): p for p in sorted(folder.rglob("*.txt")) if not p.name.endswith("Images.txt")}
        if not images.keys() & texts.keys():
            raise UserError(f"--data {folder}: neither captions.txt nor pairs of an image and a .txt file")
        bad = [f"{image}: there is no {name.name}.txt" for name, image in images.items() if name not in texts]
        bad += [f"{text}: there is no image {name.name}" for name, text in texts.items() if name not in images]
        rows = [(images[name], [line], f"{text}, line {i}") for name, text in texts.items() if name in images
                for i, line in enumerate(read_text(text).splitlines() or [""], 1)]  # fmt: skip
    else:
        raise UserError(f"--data {folder}: there is no such folder")
    there = {path: path.is_file() for path in {path for path, _, _ in rows}}
    for path, captions, where in rows:
        wrong = (f"{len(captions) + 1} columns instead of 2" if len(captions) != 1 else
                 "a quote is not closed" if "\n" in captions[0] else
                 f"there is no {path}" if not there[path] else
                 "the caption is empty" if not split_words(captions[0]) else None)  # fmt: skip
        if wrong:
            bad.append(f"{where}: {wrong}")
        else:
            found.append((path, captions[0], where))
    return found, bad

class Photos:
    """The photographs of a folder with their captions (`read_captions`), each decoded once: N images, M captions.

    images (N, 3, S, S) uint8, on the device if they fill less than half of it, else in the host's memory. words (M, L): the
    captions' tokens; spans (N, 2): an image's first caption, and how many it has. train, held_out[split]: numbers of the
    images of the split files (*trainImages.txt, dev, test), else one image in ten is "dev", 1,000 at most. Raises UserError.
    """

    kind = "photographs"

    def __init__(self, device, settings, skip_bad=False):
        self.device, folder, size = torch.device(device), Path(settings.data), settings.image_size
        fit = transforms.Compose([transforms.Resize(size), transforms.CenterCrop(size)])

        def leave_out(bad):
            if bad and not skip_bad:
                more = f" ({len(bad) - 1:,} more)" if len(bad) > 1 else ""
                raise UserError(f"{bad[0]}{more}; --skip-bad goes on without them")
            if bad:
                print(f"left out: {bad[0]}; {len(bad):,} such in all")

        def decode(path, where):  # returns the image, or what is wrong
            try:
                with Image.open(path) as image:
                    image.draft("RGB", (2 * size, 2 * size))  # a large JPEG is not decoded in full
                    return np.array(fit(ImageOps.exif_transpose(image).convert("RGB")))
            except Exception as error:  # Pillow has many ways to fail
                return f"{where}: {path} cannot be read ({first_line(error)})"

        rows, bad = read_captions(folder)
        leave_out(bad)
        captions, first_row = {}, {path: where for path, _, where in reversed(rows)}
        for path, caption, _ in rows:
            captions.setdefault(path, []).append(caption)
        with ThreadPoolExecutor() as pool:
            decoded = pool.map(decode, captions, map(first_row.get, captions))
            decoded = list(tqdm(decoded, "reading images", len(captions), leave=False, disable=rank() > 0))
        leave_out([image for image in decoded if isinstance(image, str)])
        texts = {path: texts for (path, texts), image in zip(captions.items(), decoded) if not isinstance(image, str)}

        listed = {split: set(read_text(path).splitlines()) for split in ("train", "dev", "test")
                  for path in sorted(folder.glob(f"*{split}Images.txt"))[:1]}  # fmt: skip
        if "train" not in listed:
            names = sorted((path.name for path in texts), key=lambda name: zlib.crc32(name.encode()))
            few = min(1000, max(1, len(names) // 10))
            listed = {"train": set(names[few:]), "dev": set(names[:few])}
        splits = {split: [i for i, path in enumerate(texts) if path.name in members] for split, members in listed.items()}
        for split, members in splits.items():
            if len(members) < (least := settings.batch_size if split == "train" else 1):
                raise UserError(f"--data {folder}: {len(members)} {split} images, fewer than {least}; lower --batch-size?")

        images = torch.from_numpy(np.stack([image for image in decoded if not isinstance(image, str)])).permute(0, 3, 1, 2)
        free = torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else math.inf
        home = self.device if images.nbytes < free / 2 else torch.device("cpu")
        texts, counts = list(texts.values()), torch.tensor([len(found) for found in texts.values()])
        self.vocabulary = build_vocabulary([caption for i in splits["train"] for caption in texts[i]], LEAST_COUNT)
        self.images, self.spans = images.to(home), torch.stack((counts.cumsum(0) - counts, counts), 1).to(home)
        self.words = tokenize([caption for found in texts for caption in found], self.vocabulary).to(home)
        self.held_out = {split: torch.tensor(members, device=home) for split, members in splits.items()}
        self.train = self.held_out.pop("train")

    def draw_batch(self, settings, generator):
        """One training batch: images (B, 3, S, S) in [0, 1], tokens (B, L). B different photographs, for another caption of
        an image would be a false negative; one of the captions of each; crops of half the area or more, half mirrored."""
        B, home = settings.batch_size, self.train.device
        chosen = self.train[torch.randperm(len(self.train), device=home, generator=generator)[:B]]
        u, (first, count) = torch.rand(6, B, device=home, generator=generator), self.spans[chosen].unbind(1)
        images, words = self.images[chosen], self.words[first + (u[0] * count).long()]
        if home != self.device:
            images, words, u = (x.pin_memory().to(self.device, non_blocking=True) for x in (images, words, u))
        area, ratio = 0.5 + 0.5 * u[1], (math.log(4 / 3) * (2 * u[2] - 1)).exp()
        width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
        right, down, zero = (1 - width) * (2 * u[3] - 1), (1 - height) * (2 * u[4] - 1), torch.zeros_like(width)
        theta = torch.stack((width * (u[5] - 0.5).sign(), zero, right, zero, height, down), 1).view(B, 2, 3)
        grid = F.affine_grid(theta, images.shape, align_corners=False)
        return F.grid_sample(images.float() / 255, grid, padding_mode="border", align_corners=False), words

    @torch.no_grad()
    def validate(self, model):
        """{split: [recall at 1, 5, 10 of text to image, then of image to text]} in percent, of the held-out images: whether a
        caption's image is among its nearest 1, 5, 10; whether one of an image's captions is. Ties count as wrong."""
        result = {}
        for split, chosen in self.held_out.items():
            spans = self.spans[chosen].tolist()
            words = torch.cat([self.words[first : first + count] for first, count in spans])
            owner = torch.tensor([i for i, (_, count) in enumerate(spans) for _ in range(count)], device=self.device)
            x = torch.cat([model.encode_image(part.to(self.device) / 255, True) for part in self.images[chosen].split(256)])
            t = torch.cat([model.encode_text(part.to(self.device), True) for part in words.split(1024)])
            similarity = t @ x.T  # (captions, images)
            own = similarity.gather(1, owner[:, None])
            nearest = torch.full_like(x[:, 0], -math.inf).scatter_reduce(0, owner, own[:, 0], "amax")
            ranks = (similarity >= own).sum(1), (similarity >= nearest).sum(0)
            result[split] = [100 * (rank <= k).float().mean().item() for rank in ranks for k in (1, 5, 10)]
        return result

    def report(self, results):
        """Print the table of `train`'s results, with the recall that guessing would have."""
        print(f"\n{'recall in %':32}text-to-image       image-to-text\nobjective    loss   images"
              + "    R@1   R@5  R@10" * 2 + "  seconds  images/s")  # fmt: skip
        for split, chosen in self.held_out.items():
            counts, name = self.spans[chosen][:, 1].tolist(), f"{len(chosen):,} {split}"
            N, M = len(counts), sum(counts)
            for r in results:
                print(f"{r['objective']:9}{r['loss']:8.3f}{name:>11}", "".join(f"{value:6.1f}" for value in r[split]),
                      f"{r['seconds']:7.0f}{r['images/s']:10,.0f}")  # fmt: skip
            chance = [100 * min(1, k / N) for k in (1, 5, 10)]
            chance += [100 * sum(1 - math.comb(M - c, k) / math.comb(M, k) for c in counts) / N for k in (1, 5, 10) if k <= M]
            print(f"{'chance':17}{name:>11}", "".join(f"{value:6.1f}" for value in chance))

def backbone(name, width, size, pretrained):
    """(B, 3, size, size) -> (B, d): a classification model of torchvision; d outputs replace its 1,000 classes."""
    try:
        of_size = {"image_size": size} if name.startswith("vit") else {}
        model = models.get_model(name, weights="DEFAULT" if pretrained else None, **of_size)
        for name_of_part in ("AuxLogits", "aux1", "aux2"):  # the Inceptions' further outputs
            setattr(model, name_of_part, None)
        model.aux_logits = model.transform_input = False
        path, last = [(path, m) for path, m in model.named_modules()
                      if 1000 in (getattr(m, "out_features", 0), getattr(m, "out_channels", 0))][-1]  # fmt: skip
        linear = nn.Linear(last.in_features, width) if isinstance(last, nn.Linear) else nn.Conv2d(last.in_channels, width, 1)
        model.set_submodule(path, linear)
        with torch.no_grad():
            model.eval()(torch.zeros(2, 3, size, size))
    except Exception as error:  # no network, images too small, ...
        raise UserError(f"--encoder {name} with --image-size {size}: {first_line(error)}") from None
    return model.train()

# ---- 9. Command line ------------------------------------------------------------------------------------------------

def first_line(error):
    return (str(error).splitlines() or [type(error).__name__])[0]

def fail(message, program="contextclip", store=None):
    """One line, exit status 2. Of several processes the first to fail speaks; the others fail because it left."""
    if store.add("failed", 1) == 1 if store else os.environ.get("RANK", "0") == "0":
        sys.stderr.write(f"{program}: {message}\n")
    sys.exit(2)

def make_writable(folder):
    """Make the folder if need be; raises OSError if it cannot be written: now, not after the work."""
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()

def main(arguments=None):
    parser = argparse.ArgumentParser(description="Train a contrastive image-text model without and with context; compare.")
    parser.error = fail
    for f in fields(Settings):
        kind = {"action": "store_true"} if f.type is bool else {"type": f.type, "default": f.default, "metavar": "X"}
        parser.add_argument(flag_of(f), help=f"{f.metadata['help']} {', '.join(f.metadata['choices'])} (%(default)s)", **kind)
    parser.set_defaults(objective="clip,clixp")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps (%(default)s)")
    parser.add_argument("--out", type=Path, default="runs", help="folder for checkpoints and logs (%(default)s)")
    parser.add_argument("--init", type=Path, metavar="CHECKPOINT", help="post-training: start from this model's weights")
    switches = {"resume": "go on where the same command was interrupted", "compile": "torch.compile the encoders",
                "skip-bad": "with --data, leave out the rows and images that cannot be read",
                "dry-run": "a few small steps into OUT/dry-run, to see that all works"}  # fmt: skip
    for name, text in switches.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    args, store = parser.parse_args(arguments), None
    try:
        given = {f.name: getattr(args, f.name) for f in fields(Settings)}
        if args.dry_run:
            given, args.out = given | {"steps": 20, "batch_size": min(64, args.batch_size)}, args.out / "dry-run"
        runs = [Settings(**given | {"objective": objective}) for objective in args.objective.split(",")]
        device = choose_device(args.device)
        store = join_processes(device)
        if rank():
            sys.stdout = open(os.devnull, "w")
        if args.batch_size % processes():
            raise UserError(f"--batch-size {args.batch_size}: it must be a multiple of the number of processes, {processes()}")
        init = read_checkpoint(args.init) if args.init else None
        make_writable(args.out)
        data = Photos(device, runs[0], args.skip_bad) if args.data else Atlas(device, runs[0])
        results = [train(settings, data, args.out, args.resume, init, args.compile) for settings in runs]
        if store:
            dist.destroy_process_group()
    except UserError as error:
        fail(error, store=store)
    except OSError as error:
        fail(f"{error.filename} cannot be written: {error.strerror}", store=store)
    except RuntimeError as error:  # one process's own, or that another left
        if not store:
            raise
        fail(f"process {rank()}: {first_line(error)}", store=store)
    data.report(results)

if __name__ == "__main__":
    main()
