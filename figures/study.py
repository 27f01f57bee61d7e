"""The studies of the README: short loops over settings, each one command, one CSV file and one figure in figures/.

    python figures/study.py ablations     the context loss with one part changed, as a Markdown table
    python figures/study.py number_share  gain against the share of captions that name the card's number
    python figures/study.py distortion    gain against how hard the cards are to read
    python figures/study.py steps         gain against the length of the training
    python figures/study.py width         gain against d
    python figures/study.py tuning        gain against the start of tau, on the validation tasks
    python figures/study.py post          a finished base model, continued without and with context
    python figures/study.py emergence     losses, temperatures, attention, validation during training
    python figures/study.py attention     which cards of the batch an image attends to
    python figures/study.py cards         training cards with their captions
    python figures/study.py profile       where the time of a training step goes
    python figures/study.py speed         training against the plain PyTorch way, on cards or on --data DIR
    python figures/study.py memory        memory and time of the loss against B, plain and in blocks

Models are kept in runs/study: what is trained already is not trained again, and an interrupted study goes on. `--draw`
only draws, from the CSV file. Accuracies are those of fewshot.py's 21 tasks, the mean of its six training-free classifiers
with two draws of images per training seed; intervals are `fewshot.interval`'s.
"""

import argparse
import csv
import os
import re
import sys
import textwrap
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot as plt
from PIL import Image
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import contextclip as cc  # noqa: E402
import fewshot as fs  # noqa: E402

FIGURES, RUNS = Path(__file__).resolve().parent, Path("runs/study")
SHOTS = [1, 4, 16]
PAPER = {  # of the ablations: zero-shot, 16-shot (ViT-S/16, 1.5 billion examples); its full method has alpha 0.9
    "full": (50.5, 64.1), "alpha 0.9": (50.5, 64.1), "no self-mask": (50.9, 60.5), "alpha 0.6": (48.7, 61.5),
    "shared temperature": (47.8, 61.8), "detached values": (43.8, 58.7),
}  # fmt: skip
ABLATIONS = {
    "base": {"objective": "clip"}, "full": {}, "no self-mask": {"no_mask": True}, "alpha 0.6": {"alpha": 0.6},
    "alpha 0.9": {"alpha": 0.9}, "shared temperature": {"shared_temperature": True},
    "detached values": {"detach_values": True}, "normalised values": {"normalize_values": True},
}  # fmt: skip

def sweep(name, values):
    """{value: {model: changed settings}}: a base and a context-aware model for each value of a setting."""
    return {value: {"base": {"objective": "clip", name: value}, "context": {name: value}} for value in values}

STUDIES = {  # {what is compared: {model: changed settings}}; models of one comparison see the same images
    "ablations": {"": ABLATIONS},
    "number_share": sweep("number_share", [0.0, 0.25, 0.5, 0.75, 0.9, 1.0]),
    "distortion": sweep("distortion", [0.25, 0.5, 1.0]),
    "steps": sweep("steps", [400, 800, 1600, 3200]),
    "width": sweep("width", [32, 64]),
    "tuning": sweep("tau", [3.0, 5.0, 8.0, 14.3]),
    "post": {f"{n} steps": {"base": {"objective": "clip", "steps": n, "lr": 5e-4}, "context": {"steps": n, "lr": 5e-4}}
             for n in (25, 100)},
}

@cache
def atlas_of(characters=cc.Settings.characters, distortion=cc.Settings.distortion, number_share=1.0):
    settings = cc.Settings(characters=characters, distortion=distortion, number_share=number_share)
    return cc.Atlas(cc.choose_device(), settings)

def trained(seed, init=None, folder="", **changes):
    """The checkpoint of a model with these settings, the rest as by default, trained if it is not there yet."""
    settings = cc.Settings(**{"objective": "clixp", "seed": seed} | changes)
    usual = cc.Settings(settings.objective)
    differences = [f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in changes.items() if v != getattr(usual, k)]
    out = RUNS / folder / ("-".join(differences) or "default") / f"seed{seed}"
    cc.make_writable(out)
    atlas = atlas_of(settings.characters, settings.distortion, settings.number_share)
    cc.train(settings, atlas, out, resume=True, init=init and cc.read_checkpoint(init))
    return out / f"{settings.objective}.pt"

def measure(study, seeds):
    """Train and evaluate all models of a study; rows (comparison, model, seed, task, group, shots, accuracy), zero-shot with
    0 shots. Settings are tuned on the validation tasks, with prototypes; all else is reported on the 21 tasks, with the mean
    of the six classifiers."""
    for (name, models), seed in product(STUDIES[study].items(), range(seeds)):
        more = {"init": trained(seed, objective="clip"), "folder": "post"} if study == "post" else {}
        paths = {model: trained(seed, **more, **changes) for model, changes in models.items()}
        found = defaultdict(list)
        if study == "tuning":
            for model, path in paths.items():
                result = cc.read_checkpoint(path)["result"]
                found[name, model, seed, "combinations", "combined", 0].append(result["zero-shot"])
                for task, shots in product(result["tasks"], SHOTS):
                    found[name, model, seed, task, "validation", shots].append(result["tasks"][task][shots])
        else:
            loaded = {model: cc.load(path) for model, path in paths.items()}
            settings = next(iter(loaded.values())).settings
            atlas, methods = atlas_of(settings.characters, settings.distortion, settings.number_share), ["zero-shot", *fs.SIX]
            rows, _ = fs.evaluate(loaded, fs.card_tasks(atlas), fs.validation_tasks(atlas), methods, SHOTS, range(2), 12)
            for model, task, group, _, shots, _, accuracy in rows:
                found[name, model, seed, task, group, shots].append(accuracy)
        yield from ((*key, round(sum(values) / len(values), 3)) for key, values in found.items())

def tables(rows):
    """{(comparison, model, shots): accuracies (tasks, seeds)} of `measure`'s rows; zero-shot leaves the unseen tasks out,
    whose captions have words never trained."""
    cells = defaultdict(lambda: defaultdict(list))
    for name, model, _, task, group, shots, accuracy in rows:
        if shots != "0" or group != "unseen":
            cells[name, model, int(shots)][task].append(float(accuracy))
    return {key: np.array(list(tasks.values())) for key, tasks in cells.items()}

def write_ablations(rows, path):
    """Print the table in Markdown."""
    table = tables(rows)
    print("| model | paper: zero-shot | 16-shot | here: zero-shot | 16-shot | 16-shot less full |\n" + "|---" * 6 + "|")
    for model in ABLATIONS:
        paper = [f"{value:.1f}" for value in PAPER.get(model, ())] or ["", ""]
        here = [f"{table['', model, shots].mean():.1f}" for shots in (0, 16)]
        gain, width = fs.interval(table["", model, 16] - table["", "full", 16])
        print(f"| {' | '.join([model, *paper, *here])} |", "|" if model == "full" else f" {gain:+.1f} ± {width:.1f} |", sep="")

def draw_sweep(rows, path):
    """Print a table of both models and the gain of context for each value of a setting, and draw them."""
    table = tables(rows)
    names, every = list(dict.fromkeys(key[0] for key in table)), [0, *SHOTS]

    def gain(name, shots):
        return fs.interval(table[name, "context", shots] - table[name, "base", shots])

    print(f"| {path.stem} | base: " + " | ".join(["zero-shot", *(f"{k}-shot" for k in SHOTS)]) + " | context - base: "
          + " | ".join(["zero-shot", *(f"{k}-shot" for k in SHOTS)]) + " |\n" + "|---" * 9 + "|")  # fmt: skip
    for name in names:
        base = [f"{table[name, 'base', k].mean():.1f}" for k in every]
        print(f"| {' | '.join([name, *base, *('{:+.1f} ± {:.1f}'.format(*gain(name, k)).replace(' ± nan', '') for k in every)])} |")
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained")
    for i, (shots, color) in enumerate(zip(every, ["#555555", "#0072B2", "#E69F00", "#D55E00"])):
        label = f"{shots}-shot" if shots else "zero-shot"
        for model, line in (("base", "o--"), ("context", "s-")):
            values = [table[name, model, shots].mean() for name in names]
            left.plot(range(len(names)), values, line, color=color, markersize=4, label=model if shots == SHOTS[-1] else None)
        mean, width = np.nan_to_num(np.array([gain(name, shots) for name in names])).T
        place = np.arange(len(names)) + 0.06 * (i - 1.5)
        right.errorbar(place, mean, width, color=color, marker="s", markersize=4, capsize=2, label=label)
    for axis, text in ((left, "accuracy in %"), (right, "context - base, points")):
        axis.set_xticks(range(len(names)), names)
        axis.set(xlabel={"tuning": "start of tau", "post": "post-training"}.get(path.stem, path.stem.replace("_", " ")), ylabel=text)
        axis.grid(alpha=0.3)
    right.axhline(0, color="black", linewidth=0.8)
    left.set_ylim(0)
    left.legend(fontsize=7, loc="lower right", handlelength=4)
    right.legend(fontsize=7)
    figure.savefig(path, dpi=120)

# ---- During training ------------------------------------------------------------------------------------------------

EMERGENCE = "model seed step plain_loss context_loss tau_1 tau_2 tau_ctx_sqrt_d attention_same 1-shot 4-shot 16-shot".split()

def same_character(atlas, batch, seed=1):
    """Cards of a training batch (B, 1, 32, 32), their characters (B,) and whether two share theirs (B, B), self left out."""
    generator = torch.Generator(atlas.device).manual_seed(seed)
    characters = atlas.train[torch.randint(len(atlas.train), (batch,), device=atlas.device, generator=generator)]
    images, numbers = cc.draw_cards(atlas, characters, "train", generator)
    same = (characters[:, None] == characters).fill_diagonal_(False)
    return images, numbers, same

def watch_emergence(seeds):
    """Train both models, always anew; rows of EMERGENCE every 40 steps. Losses are means over the last ten batches;
    attention_same is the share of an image's attention, on one batch, that falls on cards of its own character."""
    atlas = atlas_of()
    images, _, same = same_character(atlas, cc.Settings.batch_size)
    for settings in [cc.Settings(objective, seed=seed) for objective in ("clip", "clixp") for seed in range(seeds)]:
        seen, out = {}, RUNS / "emergence" / f"seed{settings.seed}"

        @torch.no_grad()
        def watch(step, model):
            if step % 40 == 0:
                weights = cc.attention(model.encode_image(images, normalize=True), model.log_tau_ctx.exp())
                found = atlas.validate(model)
                seen[step] = [(weights * same).sum(1)[same.any(1)].mean().item(), *(found[shots] for shots in SHOTS)]

        cc.make_writable(out)
        cc.train(settings, atlas, out, watch=watch)
        with open(out / f"{settings.objective}.csv") as file:
            log = {int(row["step"]): row for row in csv.DictReader(file)}
        for step, values in seen.items():
            logged = [log[step][column] for column in EMERGENCE[3:8]]
            yield settings.objective, settings.seed, step, *(f"{float(value):.4f}" for value in [*logged, *values])

def draw_emergence(rows, path):
    """Four panels over training steps: losses, temperatures, attention, few-shot accuracy; means over seeds."""
    data = defaultdict(lambda: defaultdict(list))  # {(model, column): {step: values}}
    for row in rows:
        for column, value in zip(EMERGENCE[3:], row[3:]):
            data[row[0], column][int(row[2])].append(float(value))
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.4), layout="constrained")
    panels = [("loss in nats", ["plain_loss", "context_loss"]), ("temperature / its start", ["tau_1", "tau_2", "tau_ctx_sqrt_d"]),
              ("attention on the same character, %", ["attention_same"]), ("validation accuracy, %", ["1-shot", "4-shot", "16-shot"])]  # fmt: skip
    start = {"tau_1": cc.Settings.tau, "tau_2": cc.Settings.tau, "tau_ctx_sqrt_d": cc.Settings.tau_ctx, "attention_same": 0.01}
    for axis, (title, columns) in zip(axes, panels):
        for column, color in zip(columns, ["#0072B2", "#D55E00", "#009E73"]):
            for model, line in (("clip", "--"), ("clixp", "-")):
                if model == "clip" and column in ("context_loss", "tau_2", "tau_ctx_sqrt_d"):
                    continue  # it has none
                steps, values = zip(*((step, np.mean(v) / start.get(column, 1)) for step, v in data[model, column].items()))
                axis.plot(steps, values, line, color=color, label=f"{column}, {model}".replace("_", " "))
        axis.set(xlabel="step", ylabel=title)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, **({"loc": "lower right", "ncols": 2} if axis is axes[3] else {}))
    axes[0].set_yscale("log")
    axes[3].set_ylim(0)
    figure.savefig(path, dpi=110)

# ---- Pictures -------------------------------------------------------------------------------------------------------

def draw_attention(path, queries=5, most=6):
    """A few cards and those that they attend to most, with the weights, by the base and by the context-aware model, both at
    the latter's tau_ctx. Green: the same character; orange: two or more digits in the same place."""
    models = [cc.load(trained(0, objective=objective)) for objective in ("clip", "clixp")]
    atlas = atlas_of()
    images, numbers, same = same_character(atlas, cc.Settings.batch_size)
    digits = (numbers[:, None] == numbers).sum(-1) >= 2
    chosen = same.any(1).nonzero()[:queries, 0].tolist()
    figure, axes = plt.subplots(queries, 2 * most + 2, figsize=(2 * most + 2, 1.2 * queries), layout="constrained")
    for axis in axes.flat:
        axis.set_axis_off()
    for side, (model, title) in enumerate(zip(models, ("base", "context"))):
        weights = cc.attention(model.encode_image(images, normalize=True), models[1].log_tau_ctx.exp())
        print(f"{title}: {100 * (weights * same).sum(1)[same.any(1)].mean():.1f} % of the attention on the same character, "
              f"{100 * (weights * digits * ~same).sum(1).mean():.1f} % on others with two digits in common "
              f"(uniform: {100 * same[same.any(1)].float().mean():.1f}, {100 * (digits * ~same).float().mean():.1f})")  # fmt: skip
        for row, query in enumerate(chosen):
            top = weights[query].topk(most)
            for column, (weight, i) in enumerate(zip([None, *top.values.tolist()], [query, *top.indices.tolist()])):
                axis = axes[row, side * (most + 1) + column]
                axis.set_axis_on()
                axis.set(xticks=[], yticks=[])
                axis.imshow(images[i, 0].numpy(force=True), cmap="gray", vmin=0, vmax=1)
                axis.set_title(f"{title}: query" if weight is None else f"{100 * weight:.1f} %", fontsize=8)
                color = "black" if weight is None else "#009E73" if same[query, i] else "#E69F00" if digits[query, i] else None
                for spine in axis.spines.values():
                    spine.set(color=color or "lightgrey", linewidth=3 if color else 1)
    figure.savefig(path, dpi=100)

def draw_cards(path, rows=3, columns=6):
    """Training cards with their captions."""
    atlas = atlas_of()
    generator = torch.Generator(atlas.device).manual_seed(0)
    images, tokens = atlas.draw_batch(cc.Settings(batch_size=rows * columns), generator)
    words = list(atlas.vocabulary)
    figure, axes = plt.subplots(rows, columns, figsize=(1.9 * columns, 2.3 * rows), layout="constrained")
    for axis, image, row in zip(axes.flat, images.cpu(), tokens.tolist()):
        axis.imshow(image[0].numpy(), cmap="gray", vmin=0, vmax=1)
        caption = " ".join(words[token] for token in row if token).replace(" number", ", number")
        axis.set_title(textwrap.fill(caption, 25), fontsize=8)
        axis.axis("off")
    figure.savefig(path, dpi=110)

def profile():
    """Print how a training step's time divides: medians in milliseconds of the full step, of the encoders alone (forward
    and backward on fixed tensors), of drawing the cards, and of the loss (forward and backward)."""
    from torch.utils.benchmark import Timer  # here, for it looks for compilers, and says so

    settings = cc.Settings("clixp")
    atlas = atlas_of(settings.characters, settings.distortion, settings.number_share)
    device, generator = atlas.device, torch.Generator(atlas.device).manual_seed(0)
    model = cc.ContextCLIP(settings, atlas.vocabulary).to(device, memory_format=torch.channels_last)
    optimizer, bf16 = cc.make_optimizer(model, settings), cc.use_bf16(settings, device)
    batch = atlas.draw_batch(settings, generator)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
    v, t = (torch.randn(settings.batch_size, settings.width, device=device, requires_grad=True) for _ in "vt")
    parts = {
        "full step": "cc.training_step(model, model, optimizer, *atlas.draw_batch(settings, generator), 0.0, bf16)",
        "encoders": "with autocast: out = model(*batch)\ntorch.autograd.backward(out, [torch.ones_like(o) for o in out])",
        "cards": "atlas.draw_batch(settings, generator)",
        "loss": "cc.lixp_loss(v, t, model, settings)[0].backward()",
    }
    scope, threads = globals() | locals(), torch.get_num_threads()
    timers = [Timer(code, globals=scope, num_threads=threads) for code in parts.values()]
    rounds = [[1000 * timer.timeit(2).median for timer in timers] for _ in range(8)]  # in turn: machines drift
    medians = np.median(rounds, axis=0)
    for name, median in zip(parts, medians):
        print(f"{name:9}{median:9.1f} ms{median / medians[0]:6.0%}")

class Files(torch.utils.data.Dataset):
    """The plain PyTorch way: every image is opened and cropped by Pillow each time that it comes. Yields image, tokens."""

    def __init__(self, rows, vocabulary, size):
        self.paths, captions, _ = zip(*rows)
        self.words = cc.tokenize(captions, vocabulary)
        crop = transforms.RandomResizedCrop(size, scale=(0.5, 1.0))
        self.fit = transforms.Compose([crop, transforms.RandomHorizontalFlip(), transforms.ToTensor()])

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        with Image.open(self.paths[i]) as image:
            return self.fit(image.convert("RGB")), self.words[i]

def time_against_plain(folder, steps=20, rounds=3):
    """Print the images per second of --data's training steps and of the plain way, by turns: the same model, losses and
    optimiser, images from a DataLoader with a worker per core, float32. Without a folder, 2,048 cards are written as one."""
    if not folder:
        folder, atlas = RUNS / "cards", atlas_of()
        cc.make_writable(folder)
        images, words = atlas.draw_batch(cc.Settings(batch_size=2048), torch.Generator(atlas.device).manual_seed(0))
        spelled = list(atlas.vocabulary)
        for i, (image, caption) in enumerate(zip((255 * images.clamp(0, 1)).byte().cpu().numpy(), words.tolist())):
            Image.fromarray(image[0]).save(folder / f"{i}.png")
            (folder / f"{i}.txt").write_text(" ".join(spelled[word] for word in caption if word))
    settings = cc.Settings("clixp", data=str(folder), image_size=64 if (Path(folder) / "captions.txt").exists() else 32)
    photos = cc.Photos(cc.choose_device(), settings)
    device, generator = photos.device, torch.Generator(photos.train.device).manual_seed(0)
    files = Files(cc.read_captions(Path(folder))[0], photos.vocabulary, settings.image_size)
    loader = torch.utils.data.DataLoader(files, settings.batch_size, shuffle=True, drop_last=True, num_workers=os.cpu_count(),
                                         persistent_workers=True, pin_memory=device.type == "cuda")  # fmt: skip

    def of_files():
        while True:
            yield from ((images.to(device), words.to(device)) for images, words in loader)

    def of_photos():
        while True:
            yield photos.draw_batch(settings, generator)

    ways = {"plain": (of_files(), False), "ours": (of_photos(), cc.use_bf16(settings, device))}
    models = {way: cc.ContextCLIP(settings, photos.vocabulary).to(device, memory_format=torch.channels_last) for way in ways}
    optimizers, found = {way: cc.make_optimizer(model, settings) for way, model in models.items()}, defaultdict(list)
    for _, (way, (batches, bf16)) in product(range(rounds + 1), ways.items()):  # the first round warms up
        start = time.perf_counter()
        for _ in range(steps):
            losses = cc.training_step(models[way], models[way], optimizers[way], *next(batches), 0.0, bf16)
        float(losses[0])  # waits for the GPU
        found[way].append(steps * settings.batch_size / (time.perf_counter() - start))
    plain, ours = (np.array(found[way][1:]) for way in ways)
    print(f"{device}, images/s: plain {plain.mean():,.0f}, ours {ours.mean():,.0f}; ratio, round by round: "
          + ", ".join(f"{ratio:.2f}" for ratio in ours / plain))  # fmt: skip

def loss_memory(B, chunk):
    """(MiB that the loss and its gradient add to a process's or the GPU's peak, median seconds of three)."""
    device, settings = cc.choose_device(), cc.Settings("clixp", batch_size=B, chunk=chunk)
    model = cc.ContextCLIP(settings, ["a"]).to(device)
    v, t = (torch.randn(B, settings.width, device=device, requires_grad=True) for _ in "vt")
    cuda, seconds = device.type == "cuda", []

    def peak():  # of this process alone, as Linux counts it; getrusage starts from the peak of the process that started it
        if cuda:
            return torch.cuda.max_memory_allocated() / 2**20
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**10

    cc.lixp_loss(v[:64], t[:64], model, settings)[0].backward()
    before = peak()
    for _ in range(3):
        start = time.perf_counter()
        cc.lixp_loss(v, t, model, settings)[0].backward()
        float(v.grad.sum())  # waits for the GPU
        seconds.append(time.perf_counter() - start)
    return peak() - before, sorted(seconds)[1]

def tabulate_memory(sizes=(1024, 2048, 4096, 8192), chunk=512):
    """Print the table in Markdown: every measurement has a process of its own. Memory is counted where malloc gives all that
    is freed back to the system (by this variable of glibc), time is taken where it keeps some, as usual."""
    print(f"| B | plain: MiB | seconds | --chunk {chunk}: MiB | seconds | memory | time |\n" + "|---" * 7 + "|")
    for B in sizes:
        found = []
        for rows in (0, chunk):
            for i, threshold in enumerate(("65536", "")):
                os.environ["MALLOC_MMAP_THRESHOLD_"] = threshold
                with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                    found.append(pool.submit(loss_memory, B, rows).result()[i])
        print(f"| {B:,} | {found[0]:,.0f} | {found[1]:.2f} | {found[2]:,.0f} | {found[3]:.2f} | "
              f"1/{found[0] / found[2]:.1f} | x {found[3] / found[1]:.2f} |", flush=True)  # fmt: skip

def main():
    parser = argparse.ArgumentParser(description="The studies of the README; see the top of the file.")
    parser.error = lambda message: cc.fail(message, "study")
    parser.add_argument("study", choices=[*STUDIES, "emergence", "attention", "cards", "profile", "speed", "memory"])
    parser.add_argument("--data", help="of speed: a folder of photographs and captions, instead of cards")
    parser.add_argument("--seeds", type=int, default=3, choices=range(1, 11), metavar="N", help="training seeds (%(default)s)")
    parser.add_argument("--draw", action="store_true", help="only draw, from the CSV file")
    args = parser.parse_args()
    path = FIGURES / f"{args.study}.png"
    try:
        if args.study == "attention":
            return draw_attention(path)
        if args.study == "cards":
            return draw_cards(path)
        if args.study == "profile":
            return profile()
        if args.study == "speed":
            return time_against_plain(args.data)
        if args.study == "memory":
            return tabulate_memory()
        data = path.with_suffix(".csv")
        if not args.draw:
            emergence = args.study == "emergence"
            rows = list(watch_emergence(args.seeds) if emergence else measure(args.study, args.seeds))
            with open(data, "w", newline="") as file:
                csv.writer(file).writerows([EMERGENCE if emergence else "of model seed task group shots accuracy".split(), *rows])
        with open(data, newline="") as file:
            rows = list(csv.reader(file))[1:]
        {"ablations": write_ablations, "emergence": draw_emergence}.get(args.study, draw_sweep)(rows, path)
    except cc.UserError as error:
        cc.fail(error, "study")
    except OSError as error:
        cc.fail(f"{error.filename}: {error.strerror}", "study")

if __name__ == "__main__":
    main()
