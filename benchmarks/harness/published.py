"""Our ResNet and the published package's, step by step beside each other. It needs `pip install absgd==0.0.1 torch`."""

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch  # pyright: ignore[reportMissingImports]
from absgd import losses as published_losses, optimizers as published_optimizers  # pyright: ignore
from flax import nnx
from rich.progress import track
from torch import nn  # pyright: ignore[reportMissingImports]
from torch.nn import functional  # pyright: ignore[reportMissingImports]

import absgd_jax
from benchmarks.harness import programs
from benchmarks.harness.names import EPOCH, PUBLISHED, ROUNDED, STEPWISE, SWEEP
from benchmarks.harness.records import Record
from examples.cifar_lt import data
from examples.cifar_lt.augment import normalise
from examples.cifar_lt.models import ResNet

TEMPERATURE, GAMMA, RATE, DECAY = 1.0, 0.9, 0.01, 5e-4


class Seen(NamedTuple):
    """What is compared of a step."""

    losses: np.ndarray  # of each example, shape=(B,)
    weights: np.ndarray  # p̃, shape=(B,)
    params: np.ndarray  # after the step, flat, in torch's order and layout


class State(NamedTuple):
    params: Any
    batch_stats: Any
    opt_state: Any


# --- absgd_jax


def make_ours(depth: int, width: int, dtype: Any) -> tuple[Any, Callable[[Any], State], Callable[..., Any]]:
    """``graphdef``, ``init(seed) -> State`` and ``step(state, images, labels) -> (State, losses)``."""

    def make_model(seed):
        return ResNet(depth, 10, width=width, dtype=dtype, rngs=nnx.Rngs(jax.random.key(seed)))

    graphdef, *_ = nnx.split(nnx.eval_shape(lambda: make_model(0)), nnx.Param, nnx.BatchStat)
    optimizer = absgd_jax.absgd(RATE, TEMPERATURE, GAMMA, weight_decay=DECAY)

    def init(seed):
        _, params, batch_stats = nnx.split(make_model(seed), nnx.Param, nnx.BatchStat)
        wide = jnp.promote_types(dtype, jnp.float32)
        params, batch_stats = jax.tree.map(lambda a: a.astype(wide), (params, batch_stats))
        return State(params, batch_stats, optimizer.init(params))

    def step(state, images, labels):
        def per_example_loss(params, images, labels):
            model = nnx.merge(graphdef, params, state.batch_stats, copy=True)
            losses = optax.softmax_cross_entropy_with_integer_labels(model(images, train=True), labels)
            return losses, (losses, nnx.state(model, nnx.BatchStat))

        risk_and_grad = absgd_jax.value_and_grad(per_example_loss, has_aux=True)
        (risk, (losses, batch_stats)), grads = risk_and_grad(state.params, images, labels, state=state.opt_state)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, value=risk)
        return State(optax.apply_updates(state.params, updates), batch_stats, opt_state), losses

    return graphdef, init, step


def torch_arrays(params: Any) -> list[np.ndarray]:
    """Our parameters in the order and the layout of torch's."""
    tree = jax.tree.map(np.asarray, nnx.to_pure_dict(params))
    halves = [block[half] for _, block in sorted(tree["blocks"].items()) for half in ("first", "second")]
    layers = [
        (layer["kernel"].transpose(3, 2, 0, 1), layer["norm"]["scale"], layer["norm"]["bias"])
        for layer in (tree["stem"], *halves)
    ]
    return [array for layer in layers for array in layer] + [tree["classifier"]["kernel"].T, tree["classifier"]["bias"]]


def flat(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.ravel(array) for array in arrays])


def our_steps(step: Callable[..., Any], state: State, batches: list[Any]) -> Iterator[Seen]:
    step = jax.jit(step)
    for images, labels in batches:
        state, losses = step(state, images, labels)
        absgd_state = state.opt_state[0]
        weights = absgd_jax.attention_weights(losses, absgd_state.risk, TEMPERATURE) / absgd_state.mass
        yield Seen(np.asarray(losses), np.asarray(weights), flat(torch_arrays(state.params)))


# --- the published package


def conv_norm(channels_in: int, channels: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(channels, eps=1e-5, momentum=0.1))  # Flax's momentum 0.9


class Block(nn.Module):
    def __init__(self, channels_in: int, channels: int, stride: int):
        super().__init__()
        before = (channels - channels_in) // 2
        self.stride, self.padding = stride, (0, 0, 0, 0, before, channels - channels_in - before)
        self.first, self.second = conv_norm(channels_in, channels, stride), conv_norm(channels, channels)

    def forward(self, x):
        y = self.second(functional.relu(self.first(x)))
        return functional.relu(y + functional.pad(x[:, :, :: self.stride, :: self.stride], self.padding))


def make_network(depth: int, width: int, arrays: list[np.ndarray]) -> nn.Sequential:
    """The network of examples/cifar_lt/models.py with given parameters, on the accelerator where there is one."""
    layers: list[nn.Module] = [conv_norm(3, width), nn.ReLU()]
    channels_in = width
    for channels in (width, 2 * width, 4 * width):
        for _ in range((depth - 2) // 6):
            layers.append(Block(channels_in, channels, 1 if channels == channels_in else 2))
            channels_in = channels
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels_in, 10))
    network.to(torch_device(), torch.tensor(arrays[-1]).dtype)
    with torch.no_grad():
        for parameter, array in zip(network.parameters(), arrays, strict=True):
            parameter.copy_(torch.tensor(array))
    return network


def torch_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def to_torch(images: np.ndarray, labels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    channels_first = torch.tensor(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    return channels_first.to(torch_device()), torch.tensor(labels).long().to(torch_device())


def make_loop(network: nn.Module, criterion: Any = None) -> Callable[[torch.Tensor, torch.Tensor], None]:
    """A step as the package's users write it."""
    criterion = criterion or nn.CrossEntropyLoss(reduction="none")
    risk: Any = published_losses.ABLoss(mylambda=TEMPERATURE, criterion=criterion, abgamma=GAMMA, abalpha=1)
    risk.updateLambda()  # or it is plain SGD
    optimizer = published_optimizers.ABSGD(network.parameters(), lr=RATE, weight_decay=DECAY)

    def step(images, labels):
        optimizer.zero_grad()
        risk(network(images), labels).backward()
        optimizer.step()

    return step


def published_steps(network: nn.Module, batches: list[Any]) -> Iterator[Seen]:
    seen: list[Any] = []

    def criterion(logits, labels):
        losses = functional.cross_entropy(logits, labels, reduction="none")
        losses.retain_grad()  # the gradient of the package's loss by the losses is p̃/B
        seen[:] = [losses]
        return losses

    step = make_loop(network, criterion)
    for images, labels in batches:
        step(*to_torch(images, labels))
        (losses,) = seen
        weights = len(labels) * losses.grad
        params = [parameter.detach().cpu().numpy() for parameter in network.parameters()]
        yield Seen(losses.detach().cpu().numpy(), weights.cpu().numpy(), flat(params))


# --- measurements


def load(options: Any, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Normalised images, shape (T, B, 32, 32, 3), float32, and labels, shape (T, B), in random order."""
    train, _ = data.load("cifar10", options.data_dir)
    order = np.random.default_rng(options.seed).permutation(len(train.labels))
    order = np.resize(order, (steps, options.batch_size))
    return np.asarray(normalise(jnp.asarray(train.inputs[order]))), train.labels[order]


def agreement(options: Any, depth: int, steps: int, dtype: Any) -> Iterator[Record]:
    """A record of the networks before the first step, and one for each step and each run beside ours."""
    images, labels = load(options, steps)
    batches = list(zip(images.astype(dtype), labels, strict=True))
    common = {"dtype": np.dtype(dtype).name, "depth": depth, "batch_size": options.batch_size}
    exact = jax.enable_x64(dtype == np.float64), jax.default_matmul_precision("highest")
    with exact[0], exact[1], torch.backends.cudnn.flags(allow_tf32=False):
        graphdef, init, step = make_ours(depth, options.width, dtype)
        state = init(options.seed)
        arrays = torch_arrays(state.params)
        network = make_network(depth, options.width, arrays)
        yield {"quantity": "forward", **common, "logits_difference": forward(graphdef, state, network, batches[0])}

        rounded = state._replace(params=jax.tree.map(lambda a: jnp.nextafter(a, jnp.inf), state.params))
        runs = {PUBLISHED: published_steps(network, batches), ROUNDED: our_steps(step, rounded, batches)}
        together = zip(our_steps(step, state, batches), *runs.values(), strict=True)
        for t, (ours, *others) in enumerate(track(together, f"{common['dtype']}, {steps} steps", steps), start=1):
            moved = np.linalg.norm(ours.params - flat(arrays))
            for method, other in zip(runs, others, strict=True):
                distances = {
                    "loss_difference": abs(ours.losses - other.losses).max() / ours.losses.mean(),
                    "weight_difference": abs(ours.weights - other.weights).max() / ours.weights.max(),
                    "parameter_distance": np.linalg.norm(ours.params - other.params) / moved,
                }
                distances = {name: rounded_to(float(value)) for name, value in distances.items()}
                loss = rounded_to(float(ours.losses.mean()))
                yield {"quantity": "trajectory", **common, "method": method, "step": t, "loss": loss, **distances}


def rounded_to(value: float) -> float:
    return float(f"{value:.4g}")


def forward(graphdef: Any, state: State, network: nn.Module, batch: Any) -> float:
    """The largest difference of the logits, relative to the largest logit, in training and in evaluation."""

    def ours(images, train):
        return nnx.merge(graphdef, state.params, state.batch_stats, copy=True)(images, train=train)

    def theirs(images, train):
        with torch.no_grad():
            return network.train(train)(images).cpu().numpy()

    pairs = [(jax.jit(ours, static_argnums=1)(batch[0], t), theirs(to_torch(*batch)[0], t)) for t in (False, True)]
    return rounded_to(max(float(abs(np.asarray(a) - b).max() / abs(b).max()) for a, b in pairs))


class Contender(NamedTuple):
    """A method whose speed is measured."""

    method: str
    dtype: str
    runs: int
    compile_s: float | None
    train: Callable[[], Any]  # returns when the last step is done


def contenders(options: Any, steps: int, accelerator: bool) -> Iterator[Contender]:
    """The package's loop first, then ours; compiled and with the images on the device."""
    images, labels = load(options, steps)
    _, init, step = make_ours(options.depth, options.width, jnp.float32)
    state = init(options.seed)

    torch.backends.cudnn.benchmark = True  # as its users do: the fastest convolutions
    loop = make_loop(make_network(options.depth, options.width, torch_arrays(state.params)))
    their_batches = [to_torch(*batch) for batch in zip(images, labels, strict=True)]

    def published():
        for batch in their_batches:
            loop(*batch)
        if accelerator:
            torch.cuda.synchronize()

    yield Contender(PUBLISHED, "float32", 1, None, published)

    batches = jnp.asarray(images), jnp.asarray(labels)

    one, seconds = compiled(step, state, *(a[0] for a in batches))

    def stepwise():
        after = state
        for t in range(steps):
            after, _ = one(after, *(a[t] for a in batches))
        jax.block_until_ready(after)

    yield Contender(STEPWISE, "float32", 1, seconds, stepwise)

    for dtype in (jnp.float32, jnp.bfloat16) if accelerator else (jnp.float32,):
        _, init, step = make_ours(options.depth, options.width, dtype)

        def epoch(state, batches, step=step):
            return jax.lax.scan(lambda state, batch: step(state, *batch), state, batches)

        yield contender(EPOCH, dtype, 1, epoch, init(options.seed), batches)
        if accelerator:
            starts = jax.vmap(init)(options.seed + jnp.arange(options.sweep))
            yield contender(SWEEP, dtype, options.sweep, jax.vmap(epoch, in_axes=(0, None)), starts, batches)


def contender(method: str, dtype: Any, runs: int, epoch: Callable[..., Any], start: State, batches: Any) -> Contender:
    program, seconds = compiled(epoch, start, batches)
    return Contender(
        method, jnp.dtype(dtype).name, runs, seconds, lambda: jax.block_until_ready(program(start, batches))
    )


def compiled(function: Callable[..., Any], *args: Any) -> tuple[Callable[..., Any], float | None]:
    """The compiled function and how many seconds that took."""
    began = time.perf_counter()
    program = jax.jit(function).lower(*args).compile()
    seconds = programs.seconds_since(began)
    return program, None if seconds is None else rounded_to(seconds)


def speed(options: Any) -> list[Record]:
    """Images per second of every method, and how many times those of the package they are, over the repeats."""
    accelerator = jax.default_backend() != "cpu"
    if accelerator != (torch_device() == "cuda"):
        return []  # nothing to compare
    steps = options.timed_steps or (390 if accelerator else 4)
    methods = list(contenders(options, steps, accelerator))
    rates: list[list[float]] = [[] for _ in methods]
    for repeat in track(range(options.repeats + 1), "Timings"):
        for method, of_method in zip(methods, rates, strict=True):
            start = time.perf_counter()
            method.train()
            if repeat:  # the first warms up
                of_method.append(method.runs * steps * options.batch_size / (time.perf_counter() - start))
    return [
        {
            "quantity": "images_per_second",
            "method": method.method,
            "device": jax.default_backend(),
            "dtype": method.dtype,
            "depth": options.depth,
            "batch_size": options.batch_size,
            "runs": method.runs,
            "threads": torch.get_num_threads(),
            "images_per_second": spread(of_method),
            "ratio": spread([ours / theirs for ours, theirs in zip(of_method, rates[0], strict=True)]),
            "compile_seconds": method.compile_s,
        }
        for method, of_method in zip(methods, rates, strict=True)
    ]


def spread(values: list[float]) -> dict[str, float]:
    return {
        "median": rounded_to(statistics.median(values)),
        "min": rounded_to(min(values)),
        "max": rounded_to(max(values)),
    }
