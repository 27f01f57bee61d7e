"""ContextCLIP: an open reimplementation of Roth, Akata, Damen, Balažević, Hénaff, "Context-Aware
Multimodal Pretraining", CVPR 2025 (arXiv 2411.15099).

The method: 1 contrastive losses, 2 context, 3 model, 4 training. The data: 5 cards that are drawn
here, 6 captions and images of your own. 7 is the command line; --help lists every setting.
"""

import argparse
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
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib import ft2font, get_data_path
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision import datasets, models, transforms
from tqdm import tqdm

RANK, WORLD_SIZE = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
OBJECTIVES = "clip siglip clixp siglixp".split()


class UserError(Exception):
    """A mistake of the user's: the command line prints it as one line and exits with status 2."""


@dataclass
class Settings:
    """What determines a run, with the number of processes. Each is a flag of the command line:

    objective: clip, siglip, with context clixp, siglixp; the flag takes several: a,b
    data: cards, or images and captions of your own, a folder or a table
    image_size: pixels that the image encoder gets, both ways
    encoder: of images: cnn, or any classification model of torchvision
    pretrained: start that model from torchvision's weights (downloads them)
    seed: of the initial weights and of every batch
    steps: optimiser steps
    batch_size: B; the other B - 1 images are an image's context
    lr: peak learning rate of AdamW, between a linear warm-up and a cosine to 0
    weight_decay: of matrices; temperatures, biases and gains have none
    width: d, of the embeddings and of the encoders
    alpha: weight of the plain loss; the context loss has 1 - alpha
    tau_max: cap of tau_1 and tau_2, which multiply cosines (CLIP's logit scale)
    tau_ctx: start of tau_ctx; the attention's cosines are divided by tau_ctx sqrt(d)
    number_share: share of the cards whose caption names their number
    float32: never bf16 in the image encoder (else where the hardware has it)
    chunk: rows of a block in which losses and attention are computed, to save memory; 0: all
    no_mask: ablation: an image may attend to itself
    shared_temperature: ablation: tau_1 and b_1 serve the context loss too
    detach_values: ablation: no gradient into the values V
    normalize_values: ablation: values V are normalised
    init: post-training: start from the weights of this checkpoint
    compile: torch.compile the image encoder
    """

    objective: str = "clip"
    data: str = "cards"
    image_size: int = 32
    encoder: str = "cnn"
    pretrained: bool = False
    seed: int = 0
    steps: int = 3200
    batch_size: int = 512
    lr: float = 2e-3
    weight_decay: float = 0.1
    width: int = 64
    alpha: float = 0.9
    tau_max: float = 100.0
    tau_ctx: float = 1 / 32
    number_share: float = 1.0
    float32: bool = False
    chunk: int = 0
    no_mask: bool = False
    shared_temperature: bool = False
    detach_values: bool = False
    normalize_values: bool = False
    init: str = ""
    compile: bool = False

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
        rates = min(self.lr, self.weight_decay, self.tau_max - 1, self.image_size - 1)
        if not min(rates, self.steps - 1, self.batch_size - 2, self.width - 2) >= 0:
            raise UserError(
                "at least: --steps, --image-size, --tau-max 1; --batch-size, --width 2; others 0"
            )


# ---- 1. Contrastive losses -----------------------------------------------------------------------
# X, T (B, d): normalised embeddings of the batch's images and texts, row j of both is a pair.
# i (n,): the rows that are asked for. A loss has a term for each of them (n,), in nats; L is the
# mean over all B rows.


def clip_loss(i, X, T, tau, b=None):
    """Softmax contrastive loss, InfoNCE (Radford et al. 2021): logits s_ij = tau x_i.t_j, the mean
    of the cross-entropies of image to text and of text to image, where j = i is right. It has no b;
    the argument is there so that both losses are called alike."""
    image_to_text = F.cross_entropy(tau * X[i] @ T.T, i, reduction="none")
    text_to_image = F.cross_entropy(tau * T[i] @ X.T, i, reduction="none")
    return (image_to_text + text_to_image) / 2


def siglip_loss(i, X, T, tau, b):
    """Sigmoid contrastive loss (Zhai et al. 2023): -sum_j log sigmoid(z_ij s_ij), logits
    s_ij = tau x_i.t_j + b, labels z_ij = 1 where j = i and else -1."""
    s = tau * X[i] @ T.T + b
    z = 2 * F.one_hot(i, len(T)) - 1
    return -F.logsigmoid(z * s).sum(1)


# ---- 2. Context ----------------------------------------------------------------------------------
def contextualize(i, X, V, tau_ctx, mask=True):
    """x_ctx_i = softmax_j( x_i.x_j / (tau_ctx sqrt(d)) ) V, with `mask` over j != i: image i
    rebuilt from others (n, d). Queries and keys are X; values V (B, d), not normalised."""
    scores = X[i] @ X.T / (tau_ctx * X.shape[1] ** 0.5)
    if mask:
        scores = scores.scatter(1, i[:, None], -math.inf)
    return scores.softmax(1) @ V


def lixp_loss(v, u, scalars, settings):
    """L_LIxP = alpha L(X, T; tau_1) + (1 - alpha) L(X_ctx, T; tau_2), or the first L alone.
    v, u (n, d): embeddings of this process's images and texts, not normalised; scalars (5,) of
    `ContextCLIP.scalars`. Gradients flow through queries, keys and values. Returns (3,) nats, means
    over the n pairs: the loss, its plain term, its context term."""
    V, U = gather(v), gather(u)  # (B, d), of all processes
    X, T = F.normalize(V), F.normalize(U)
    i = torch.arange(len(v), device=v.device) + RANK * len(v)  # this process's rows
    tau_1, tau_2, tau_ctx, b_1, b_2 = scalars
    loss = siglip_loss if settings.is_sigmoid else clip_loss

    plain = in_blocks(settings.chunk, loss, i, X, T, tau_1, b_1).mean()
    if not settings.has_context:
        return torch.stack((plain, plain, 0 * plain))

    if settings.shared_temperature:
        tau_2, b_2 = tau_1, b_1
    if settings.normalize_values:
        V = X
    if settings.detach_values:
        V = V.detach()
    x_ctx = in_blocks(settings.chunk, contextualize, i, X, V, tau_ctx, not settings.no_mask)
    X_ctx = F.normalize(gather(x_ctx))  # our reading: L compares directions, as everywhere
    context = in_blocks(settings.chunk, loss, i, X_ctx, T, tau_2, b_2).mean()
    return torch.stack((settings.alpha * plain + (1 - settings.alpha) * context, plain, context))


def in_blocks(chunk, function, i, *inputs):
    """function(i, *inputs), a result for each row i. With `chunk` the rows are cut into blocks, of
    which each is computed again in the backward pass: no B x B matrix is kept."""
    if chunk < 1:
        return function(i, *inputs)
    blocks = [checkpoint(function, rows, *inputs, use_reentrant=False) for rows in i.split(chunk)]
    return torch.cat(blocks)


def gather(x):
    """Rows of this process -> rows of all, by rank. A process needs all rows, as negatives and as
    context, and averages the losses of its own. So a row has gradients from every process: they are
    summed here, and DistributedDataParallel divides the sum by the number of processes."""
    if WORLD_SIZE == 1:
        return x

    def sum_over_processes(gradient):
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient

    parts = [torch.empty_like(x) for _ in range(WORLD_SIZE)]
    dist.all_gather(parts, x.detach())
    parts[RANK] = x  # the only one with gradients
    everyone = torch.cat(parts)
    everyone.register_hook(sum_over_processes)
    return everyone


# ---- 3. Model ------------------------------------------------------------------------------------
def cnn(channels, size, width):
    """(B, channels, size, size) -> (B, d). No batch norm: an embedding depends on its image alone,
    context enters by the loss. No pooling: it would lose where on the card a digit stands."""

    def layer(inputs, outputs, stride):
        return [nn.GroupNorm(1, inputs), nn.ReLU(True), nn.Conv2d(inputs, outputs, 3, stride, 1)]

    inputs, side = width // 2, math.ceil(size / 4)
    layers = [nn.Conv2d(channels, inputs, 7, stride=4, padding=3), *layer(inputs, inputs, 1)]
    while side > 4:
        layers += [*layer(inputs, width, 2), *layer(width, width, 1)]
        inputs, side = width, math.ceil(side / 2)
    layers += [nn.GroupNorm(1, inputs), nn.ReLU(True), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(inputs * side**2, width))


def torchvision_encoder(settings):
    """(B, 3, S, S) -> (B, d): a linear layer on the 1,000 outputs of a classifier. Raises UserError
    if torchvision has none of that name, or it does not turn such images into a tensor."""
    name, S = settings.encoder, settings.image_size
    try:
        classifier = models.get_model(name, weights="DEFAULT" if settings.pretrained else None)
        encoder = nn.Sequential(classifier, nn.Linear(1000, settings.width))
        encoder(torch.zeros(2, 3, S, S))
    except Exception as error:
        raise UserError(f"--encoder {name}, --image-size {S}: {error}") from error
    return encoder


class TextEncoder(nn.Module):
    """tokens (B, L) -> (B, d): the words' embeddings with their positions, pooled by attention. A
    caption becomes `heads` weighted sums of its words, and a linear layer of these: so new
    combinations of known words find their image."""

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


class ContextCLIP(nn.Module):
    """The two encoders, and the learned scalars of the losses. Every objective has the same
    parameters, drawn in the same order: one seed, one start."""

    def __init__(self, settings, vocabulary):
        super().__init__()
        self.settings, self.vocabulary = settings, vocabulary
        self.channels = 1 if settings.encoder == "cnn" and settings.is_cards else 3
        if settings.encoder == "cnn":
            self.image_encoder = cnn(self.channels, settings.image_size, settings.width)
        else:
            self.image_encoder = torchvision_encoder(settings)
        self.encode_text = TextEncoder(len(vocabulary), settings.width)
        tau = min(10.0 if settings.is_sigmoid else 5.0, settings.tau_max)
        self.log_tau = nn.Parameter(torch.tensor([tau, tau, settings.tau_ctx]).log())
        self.b = nn.Parameter(torch.full((2,), -10.0))

    def scalars(self):
        """tau_1, tau_2, tau_ctx, b_1, b_2 (5,). tau_1 and tau_2 multiply cosines, tau_ctx divides
        them; each tau is the exponential of what is learned. One tensor: those that a loss does not
        use have gradients of 0, not none, as DistributedDataParallel needs."""
        return torch.cat((self.log_tau.exp(), self.b))

    def encode_image(self, images):
        """images (B, 1 or 3, S, S) in about [0, 1] -> v (B, d) float32, not normalised, as are
        u = encode_text(tokens (B, L)). Images of another size are resized; the cnn of cards takes
        images of one channel only."""
        images = transforms.functional.resize(images, [self.settings.image_size] * 2)
        images = 4 * images.expand(-1, self.channels, -1, -1) - 2  # mean 0, deviation about 1
        images = images.contiguous(memory_format=torch.channels_last)
        bf16 = torch.cpu.get_capabilities().get("avx512_bf16", False)  # in hardware
        if images.is_cuda:
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        with torch.autocast(images.device.type, torch.bfloat16, bf16 and not self.settings.float32):
            return self.image_encoder(images).float()

    def forward(self, images, tokens):
        """images (B, 1 or 3, S, S), tokens (B, L) -> the three terms of `lixp_loss`."""
        v, u = self.encode_image(images), self.encode_text(tokens)
        return lixp_loss(v, u, self.scalars(), self.settings)


MAX_WORDS = 32  # of a caption; more are cut off
WORD = r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]|[\w-]+"  # Thai, Lao, Chinese, Japanese: a letter
NUMERALS = "zero one two three four five six seven eight nine".split()


def spell(number):
    """How a caption names the number of a card, from 0 to 999: "number four seven one"."""
    return "number " + " ".join(NUMERALS[int(digit)] for digit in f"{number:03}")


def split_words(caption):
    return re.findall(WORD, caption.lower())


def build_vocabulary(captions, min_count=1):
    """{word: token} of words that come `min_count` times or more; 0 is padding, 1 other words."""
    counts = Counter(word for caption in captions for word in split_words(caption))
    words = sorted(word for word in counts if counts[word] >= min_count)
    return {word: token for token, word in enumerate(["<pad>", "<unk>", *words])}


def tokenize(captions, vocabulary):
    """N captions -> tokens (N, L) int64, L the longest; an empty caption is an unknown word."""
    captions = [captions] if isinstance(captions, str) else captions
    words = [split_words(caption)[:MAX_WORDS] or ["<unk>"] for caption in captions]
    rows = [torch.tensor([vocabulary.get(word, 1) for word in row]) for row in words]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)


def embed_images(model, images):
    """images (N, 1 or 3, S, S) -> x (N, d) normalised, in parts that fit in memory."""
    return F.normalize(torch.cat([model.encode_image(part) for part in images.split(256)]))


def embed_classes(model, captions):
    """C lists of equally many captions -> T (C, d) normalised, the mean of each list. A model of
    cards expects a number after a name: the mean is over ten too, 000, 111, ... 999."""
    endings = [""]
    if model.settings.is_cards and model.settings.number_share:
        endings = [f" {spell(number)}" for number in range(0, 1000, 111)]
    texts = [text + ending for group in captions for text in group for ending in endings]
    tokens = tokenize(texts, model.vocabulary).to(model.b.device)
    t = F.normalize(model.encode_text(tokens)).unflatten(0, (len(captions), -1))
    return F.normalize(t.mean(1))


# ---- 4. Training ---------------------------------------------------------------------------------
EVERY = 200  # steps from one validation, line of the log and checkpoint to the next
LOGGED = "loss plain_loss context_loss tau_1 tau_2 tau_ctx b_1 b_2".split()


def train(settings, data, out):
    """Train a model on Cards or Photos, into out/<objective>.pt and .csv; what is there goes on
    (the command line asks for --resume). Raises UserError, OSError."""
    path, steps = out / f"{settings.objective}.pt", settings.steps
    model, optimizer, log = start(settings, data, path)
    if settings.compile:
        model.image_encoder.compile()
    forward = nn.parallel.DistributedDataParallel(model) if WORLD_SIZE > 1 else model
    done, begin, recent = log[-1]["step"], time.perf_counter() - log[-1]["seconds"], []

    hidden = RANK > 0 or None  # None: tqdm shows a bar only in a terminal
    for step in tqdm(range(done + 1, steps + 1), initial=done, total=steps, disable=hidden):
        # all that is random in a step: a resumed run is the same, objectives see the same batches
        # (unlike a string's, the hash of integers is the same in every run)
        torch.manual_seed(hash((settings.seed, step, RANK)))
        images, tokens = data.draw_batch(settings)
        losses = forward(images, tokens)  # the loss, its plain term, its context term
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings)
        optimizer.zero_grad()
        losses[0].backward()
        optimizer.step()
        model.log_tau.data[:2].clamp_(0, math.log(settings.tau_max))  # 1 to tau_max
        recent.append(losses.detach())

        if step % EVERY == 0 or step == steps:
            row = {"step": step, "seconds": time.perf_counter() - begin}
            validate_and_save(row, torch.stack(recent).mean(0), model, optimizer, data, log, path)
            recent.clear()


def validate_and_save(row, losses, model, optimizer, data, log, path):
    """What happens every 200 steps: validate, print a line, append it to the log, save. losses
    (3,): of this process's rows, the mean since the last time. Raises UserError if they or the
    weights are not finite."""
    values = torch.cat((losses, model.scalars())).tolist()
    if not math.isfinite(sum(values) + nn.utils.get_total_norm(model.parameters())):
        raise UserError(f"not finite at step {row['step']}, {path} is as it was; a lower --lr?")
    if RANK == 0:
        found = data.validate(model.eval())
        model.train()
        log.append(row | dict(zip(LOGGED, values, strict=True)) | found)
        save(path, model, optimizer, log)
        write_csv(path.with_suffix(".csv"), log[1:])
        line = f"{path.stem}  step {row['step']}  {row['seconds']:.0f} s  loss {values[0]:.3f}"
        tqdm.write("  ".join([line, *(f"{name} {found[name]:.1f}" for name in found)]))


def learning_rate(step, settings):
    """The smaller of a linear warm-up over a twentieth of the steps and a cosine to 0."""
    warmup = step / max(1, settings.steps // 20)
    cosine = (1 + math.cos(math.pi * (step - 1) / settings.steps)) / 2
    return settings.lr * min(warmup, cosine)


def start(settings, data, path):
    """A model, its optimiser and its log: new, or as saved at `path`. Raises UserError, OSError."""
    torch.manual_seed(hash((settings.seed, 0)))
    model = ContextCLIP(settings, data.vocabulary)
    if settings.init:
        start_from(load(settings.init), model)
    model.to(data.device, memory_format=torch.channels_last)
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
        weight_decay=settings.weight_decay,
        fused=True,
    )
    log = [{"step": 0, "seconds": 0.0}]

    chance = math.log(settings.batch_size) + settings.is_sigmoid  # sigmoid, all logits -log B
    print(f"{path.stem}: {data.device}, {data.about}; loss at chance {chance:.2f}")
    if path.exists():
        saved = read_checkpoint(path)
        made = {n: v for n, v in asdict(saved["settings"]).items() if v != getattr(settings, n)}
        if made or saved["vocabulary"] != data.vocabulary:
            raise UserError(f"--resume: {path} was made with {made or 'other captions'}")
        log = saved["log"]
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    elif RANK == 0:
        save(path, model, optimizer, log)  # from here on the name is taken
    return model, optimizer, log


def start_from(base, model):
    """Post-training: all weights of another model, tau_ctx too. One without context has learned
    neither tau_2 nor b_2: they start as tau_1, b_1. Raises UserError if the models differ."""
    if base.vocabulary != model.vocabulary or str(base) != str(model):
        raise UserError("--init: that model has other words, or another encoder or width")
    model.load_state_dict(base.state_dict())
    if not base.settings.has_context:
        for learned in (model.log_tau, model.b):
            learned.data[1] = learned.data[0]


def save(path, model, optimizer, log):
    """Write a checkpoint, by way of another file: `path` is always whole. Raises OSError."""
    content = {
        "settings": asdict(model.settings),
        "vocabulary": model.vocabulary,
        "log": log,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    buffer, temporary = io.BytesIO(), path.with_suffix(".tmp")
    torch.save(content, buffer)
    try:
        temporary.write_bytes(buffer.getvalue())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_csv(path, rows):
    """Write dictionaries of the same keys. Raises OSError."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def read_checkpoint(path):
    """The dictionary that `save` wrote, its settings as Settings. Raises UserError."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        return content | {"settings": Settings(**content["settings"])}
    except Exception as error:
        raise UserError(f"{path}: no checkpoint of this version ({error!r:.60})") from error


def load(path, device="cpu"):
    """A trained model for use, with its `vocabulary` for `tokenize`. Raises UserError."""
    saved = read_checkpoint(path)
    settings = replace(saved["settings"], pretrained=False)  # no download
    model = ContextCLIP(settings, saved["vocabulary"])
    model.load_state_dict(saved["model"])
    if saved["log"][-1]["step"] < settings.steps:
        print(f"note: the training of {path} is not finished")
    return model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


# ---- 5. Cards ------------------------------------------------------------------------------------
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
    return transforms.functional.pil_to_tensor(canvas)


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
        self.about = f"{len(train)} characters, {len(self.vocabulary)} words"
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

        tokens = self.tokens[chosen]
        named = torch.rand(len(tokens), 1, device=self.device) < settings.number_share
        end = (tokens != 0).sum(1, keepdim=True) + torch.arange(4, device=self.device)
        return images, tokens.scatter(1, end, self.number_tokens[numbers] * named)

    @torch.no_grad()
    def validate(self, model):
        """Percent right of 16 cards of each validation character, in typefaces that neither train
        nor test: by the nearest class mean of k others, and of combinations, zero-shot."""
        torch.manual_seed(0)
        rows = torch.tensor(sum(self.validation, []), device=self.device).repeat(32)
        numbers = integers(rows, 0, 1000)
        x = embed_images(model, draw_cards(self, rows, numbers, "validation"))
        query, support = x.view(2, 16, -1, x.shape[1])  # (16, C, d)
        means = {f"{k}-shot": F.normalize(support[:k].mean(0)) for k in (1, 4, 16)}
        T = embed_classes(model, [[self.names[i]] for i in self.validation[0]])  # the first rows
        classes = {"zero-shot": T} | means
        return {
            name: percent_right(query[:, : len(P)].flatten(0, 1) @ P.T)
            for name, P in classes.items()
        }


def percent_right(scores):
    """scores (n, C), row r of class r % C -> the share of rows where that is the highest."""
    right = scores.argmax(1) == torch.arange(len(scores), device=scores.device) % scores.shape[1]
    return 100 * right.float().mean().item()


def draw_different(n, settings, device):
    """A number below n for each of this process's part of a batch: no two of the batch are equal
    while there are enough. Of the numbers each process has every WORLD_SIZE-th."""
    count, own = settings.batch_size // WORLD_SIZE, n // WORLD_SIZE
    return torch.randperm(max(count, own), device=device)[:count] % own * WORLD_SIZE + RANK


def integers(x, low, high):
    """A random number from low to high - 1 for each of x (n, ...) -> (n,)."""
    return torch.randint(low, high, (len(x),), device=x.device)


def uniform(x, low, high):
    """A random number for each of x (n, ...) -> (n, 1, 1)."""
    return torch.empty(len(x), 1, 1, device=x.device).uniform_(low, high)


def draw_cards(cards, characters, numbers, split):
    """One card each: a character under a plate with a number, both in random typefaces of the
    split, in random shades, with noise. characters, rows of `cards`, and numbers from 0 to 999 (n,)
    -> images (n, 1, 32, 32) float32 in about [0, 1]."""
    faces = FACE_SPLITS[split]
    has_glyph = cards.has_glyph[characters, faces].float()
    face = (torch.rand_like(has_glyph) * has_glyph).argmax(1) + faces.start
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
    top = integers(images, 0, 4) + 20 * integers(images, 0, 2)
    left = integers(images, 0, 9)
    windows = images.unfold(2, 9, 1).unfold(3, 24, 1)  # (n, 1, 24, 9, 9, 24), a view
    plates = torch.lerp(background, ink, cards.plates[numbers, face] / 255)
    windows[torch.arange(len(top), device=top.device), 0, top, left] = plates


# ---- 6. Captions and images of your own ----------------------------------------------------------
COLUMNS = [  # names of the image's and of the caption's; the first that is there counts
    "image image_name file_name filename filepath path".split(),
    "caption comment text title sentence".split(),
]


def read_table(path):
    """Yields (image's path, caption) of a table with a header, between its cells a comma, tab,
    semicolon or bar; images lie beside it or in one of its subfolders. The caption is empty where a
    row does not fit the header. Raises UserError, OSError."""
    csv.field_size_limit(2**31 - 1)
    lines = io.StringIO(path.read_text("utf-8-sig", "replace")).readlines() or [""]
    reader = csv.reader(lines, delimiter=max(",\t;|", key=lines[0].count))
    header = [name.strip().lower() for name in next(reader)]
    image, caption = ([header.index(n) for n in names if n in header] for names in COLUMNS)
    if not image or not caption:
        raise UserError(f"{path}: its first line does not name an image and a caption, {COLUMNS}")

    folders = [path.parent, *sorted(path.parent.glob("*/"))]
    line = reader.line_num
    for row in reader:
        if reader.line_num > line + 1 and "".join(lines[line : reader.line_num]).count('"') % 2:
            raise UserError(f"{path}, line {line + 1}: a quote opens there and is never closed")
        line = reader.line_num
        places = [folder / (row + header)[image[0]].strip() for folder in folders]
        if row:  # no empty line
            found = next(filter(os.path.isfile, places), places[0])
            yield found, row[caption[0]] if len(row) == len(header) else ""


def read_pairs(folder):
    """Yields the same of images with their captions beside them: a.jpg, and a.txt, one a line."""
    for path in sorted(folder.rglob("[!.]*.*")):
        text = path.with_suffix(".txt")
        if path.suffix.lower() in datasets.folder.IMG_EXTENSIONS:
            captions = text.read_text("utf-8", "replace") if text.exists() else ""
            yield from ((path, caption) for caption in captions.strip().split("\n"))


def read_captions(source):
    """[(image's path, caption)] of what --data names: a table, or a folder with one, or with pairs.
    Raises UserError, OSError."""
    tables = [source]
    if source.is_dir():
        tables = [*source.glob("[!.]*.[ct]sv"), *source.glob("captions.txt")]
    pairs = [*(read_table(*tables) if len(tables) == 1 else read_pairs(source))]
    if not any(caption for _, caption in pairs):
        raise UserError(
            f"--data {source}: it takes one table (captions.txt, a .csv, a .tsv), there are "
            f"{len(tables)}, or pairs of an image and a .txt, there are none"
        )
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
        return transforms.functional.to_tensor(image)

    return read


class Photos:
    """Images with their captions, each decoded once: images (N, 3, S, S) uint8, of which the first
    n train; tokens (N, most, L) of each one's captions, of which there are counts (N,). Raises
    UserError, OSError."""

    def __init__(self, device, settings):
        self.device, source, fit = device, Path(settings.data), preprocess(settings)
        images, captions, bad = {}, {}, []
        for path, caption in tqdm(read_captions(source), disable=None):
            try:
                if not split_words(caption) or "\ufffd" in caption:
                    raise ValueError("no caption in UTF-8, or cells that do not fit the header")
                if path not in images:
                    images[path] = (255 * fit(Image.open(path))).round().byte()
                if len(captions.setdefault(path, [])) == 16:
                    raise ValueError("16 captions of an image are kept, it has more")
                captions[path].append(caption)
            except Exception as error:
                bad.append(f"{path}: {error}")
        if bad:
            print(f"left out: {len(bad):,} captions, the first that of {bad[0]}")

        paths = sorted(
            images, key=lambda path: zlib.crc32(os.fsencode(os.path.relpath(path, source)))
        )
        self.n = max(len(paths) * 9 // 10, len(paths) - 1000)  # the others validate
        if self.n < settings.batch_size:
            raise UserError(f"--data {source}: {self.n} images to train on are less than a batch")
        self.images = torch.stack([images[path] for path in paths]).to(device)
        texts = [text for path in paths for text in captions[path]]
        counts = [len(captions[path]) for path in paths]
        self.counts = torch.tensor(counts, device=device)
        self.vocabulary = build_vocabulary(texts[: sum(counts[: self.n])], min_count=5)
        tokens = tokenize(texts, self.vocabulary)
        padded = nn.utils.rnn.pad_sequence(tokens.split(counts), batch_first=True)
        self.tokens = padded.to(device)

        unknown = (tokens[tokens > 0] == 1).float().mean().item()
        long = sum(len(split_words(text)) > MAX_WORDS for text in texts)
        self.about = (
            f"{self.n:,} images, {len(self.vocabulary):,} words, {unknown:.0%} unknown, "
            f"{long:,} captions cut to {MAX_WORDS} words"
        )

    def draw_batch(self, settings):
        """This process's part of a batch: images (n, 3, S, S) in [0, 1] and tokens (n, L). No image
        comes twice, its captions would be false negatives. Of each one caption, and a square of
        half its area or more, mirrored half the time."""
        chosen = draw_different(self.n, settings, self.device)
        images = self.images[chosen] / 255
        caption = (uniform(images, 0, 1).flatten() * self.counts[chosen]).long()
        side, mirror = uniform(images, 0.5, 1).sqrt(), uniform(images, -1, 1).sign()
        right = (1 - side) * uniform(images, -1, 1)
        down = (1 - side) * uniform(images, -1, 1)
        images = resample(images, side * mirror, 0, right, 0, side, down)
        return images, self.tokens[chosen, caption]

    @torch.no_grad()
    def validate(self, model):
        """Recall in percent on held-out images: of how many captions one of the k nearest images
        is right, its own or one that has the same caption."""
        tokens = self.tokens[self.n :]
        owner, place = tokens[:, :, 0].nonzero(as_tuple=True)  # (M,), of M captions
        captions, text = tokens[owner, place].unique(dim=0, return_inverse=True)
        x = embed_images(model, self.images[self.n :] / 255)
        cosines = F.normalize(model.encode_text(captions)) @ x.T  # (distinct captions, images)
        right = torch.zeros_like(cosines, dtype=torch.bool)
        right[text, owner] = True
        hits = right.gather(1, cosines.topk(min(10, len(x))).indices)[text]  # (M, 10)
        return {f"R@{k}": 100 * hits[:, :k].any(1).float().mean().item() for k in (1, 5, 10)}


# ---- 7. The command line -------------------------------------------------------------------------
def choose_device(cpu):
    """The accelerator if there is one, for each process its own, or else the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if cpu or not accelerator:
        return torch.device("cpu")
    torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", 0)))
    torch.set_float32_matmul_precision("high")  # TF32
    return accelerator


def report_errors(parser, function, arguments):
    """function(arguments); what the user can mend is one line and exit status 2."""
    try:
        function(parser.parse_args(arguments))
    except KeyboardInterrupt:
        parser.exit(130, "stopped; the same command with --resume goes on\n")
    except (UserError, OSError, torch.OutOfMemoryError) as error:
        parser.error(" ".join(str(error).split()))


def run(args):
    given = {name: getattr(args, name) for name in asdict(Settings())}
    runs = [Settings(**given | {"objective": name}) for name in args.objective.split(",")]
    for settings in runs:
        path = args.out / f"{settings.objective}.pt"
        if path.exists() and not args.resume:
            raise UserError(f"{path} is there: --resume goes on with it, or take another --out")
    if args.batch_size % WORLD_SIZE:
        raise UserError(f"--batch-size {args.batch_size}: not a multiple of {WORLD_SIZE} processes")
    device = choose_device(args.cpu)
    if WORLD_SIZE > 1:  # the batch is divided between them
        dist.init_process_group()
    if RANK:
        sys.stdout = open(os.devnull, "w")

    args.out.mkdir(parents=True, exist_ok=True)
    data = Cards(device) if runs[0].is_cards else Photos(device, runs[0])
    for settings in runs:
        train(settings, data, args.out)
    print("next: python fewshot.py, with the same --out")
    if WORLD_SIZE > 1:
        dist.destroy_process_group()


def main(arguments=None):
    parser = argparse.ArgumentParser("contextclip", argparse.SUPPRESS, "Train and compare models.")
    add, helps = parser.add_argument, dict(re.findall(r"(\w+): (.+)", Settings.__doc__))
    for name, default in asdict(Settings()).items():
        kind = {"type": type(default), "metavar": "X"}
        if default is False:
            kind = {"action": "store_true"}
        kind |= {"default": default, "help": f"{helps[name]} (%(default)s)"}
        add(f"--{name.replace('_', '-')}", **kind)
    parser.set_defaults(objective="clip,clixp")
    add("--cpu", action="store_true", help="use no accelerator")
    add("--out", type=Path, default=Path("runs"), help="folder of results (runs)")
    add("--resume", action="store_true", help="go on where this was interrupted")
    report_errors(parser, run, arguments)


if __name__ == "__main__":
    main()
