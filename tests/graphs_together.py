"""Replayed encoders beside everything else in one process that makes CUDA graphs: `graphs_together.py KIND SECONDS`.

Rounds of replays (at more lengths than there are places for graphs, of a model that stays and of models that go),
graphs captured by hand that are kept and dropped, `torch.compile(mode="reduce-overhead")`, generation with a static
cache, training steps, and memory handed back. Every replay must be the ordinary call's output bit for bit, and what
the others give must not change. KIND is "rounds" for that, or "threads" for models that record and replay in threads
at once. Without CUDA nothing is recorded; everything runs all the same.
"""

import copy
import gc
import random
import sys
import threading
import time
from collections.abc import Callable

import torch

from modeling_colt5 import CoLT5Config, CoLT5EncoderModel, CoLT5ForConditionalGeneration
from modeling_colt5 import run_graphs as graphs

ON_GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if ON_GPU else ("cpu", torch.float32)
LENGTHS = [256 * (4 + index) if ON_GPU else 32 * (2 + index) for index in range(graphs.MOST_GRAPHS + 4)]
VOCABULARY = 512


def make(model_class: type, seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    sizes = {"d_model": 256, "d_kv": 32, "d_ff": 256, "light_d_ff": 256, "heavy_d_ff": 1024, "num_heads": 4}
    config = CoLT5Config(
        **sizes, vocab_size=VOCABULARY, num_layers=2, num_decoder_layers=2, dropout_rate=0.0, use_cuda_graphs=True
    )
    return model_class(config).to(DEVICE, DTYPE).eval()


def batch(length: int) -> dict[str, torch.Tensor]:
    """Two rows of random tokens, the second of random length. Drawn on the CPU: while one thread records, PyTorch
    gives no other one random numbers of the GPU."""
    ids = torch.randint(3, VOCABULARY, (2, length)).to(DEVICE)
    mask = torch.ones_like(ids)
    mask[1, random.randint(length // 2, length) :] = 0
    return {"input_ids": ids, "attention_mask": mask}


def ordinary(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    model.config.use_cuda_graphs = False
    with torch.no_grad():
        output = model(**inputs).last_hidden_state
    model.config.use_cuda_graphs = True
    return output


def check_replays(model: torch.nn.Module, length: int, calls: int = 4) -> None:
    """Calls with tokens of their own; compared at the end, when later replays have written over what is shared."""
    kept = []
    for _ in range(calls):
        inputs = batch(length)
        with torch.no_grad():
            kept.append((model(**inputs).last_hidden_state, inputs))
    for number, (output, inputs) in enumerate(kept):
        assert torch.equal(output, ordinary(model, inputs)), f"length {length}: call {number} differs"


def capture(call: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """The call as a graph of the caller's, the way PyTorch's manual has it."""
    if not ON_GPU:
        return call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    # or graphs captured on one stream would share a workspace in the memory of the first of them, which goes with it:
    # https://github.com/pytorch/pytorch/issues/193402
    torch._C._cuda_clearCublasWorkspaces()
    with torch.cuda.graph(graph):
        output = call()
    torch._C._cuda_clearCublasWorkspaces()

    # what the call reads has to live as long as the graph
    def replay(_reads: object = call) -> torch.Tensor:
        graph.replay()
        return output

    return replay


def capture_forward(model: torch.nn.Module) -> Callable[[], None]:
    inputs = batch(random.choice(LENGTHS))
    expected = ordinary(model, inputs)

    def call() -> torch.Tensor:
        with torch.no_grad():
            return model(**inputs).last_hidden_state

    replay = capture(call)

    def check() -> None:
        assert torch.equal(replay(), expected), "a forward pass captured by hand differs"

    return check


def capture_both(model: torch.nn.Module) -> Callable[[], None]:
    inputs = batch(random.choice(LENGTHS))
    weight = model.encoder.block[0].layer[0].light_attention.q.weight

    def call() -> torch.Tensor:
        model.zero_grad()
        model(**inputs).last_hidden_state.float().square().mean().backward()
        assert weight.grad is not None
        return weight.grad

    model.zero_grad()
    expected = call().clone()
    replay = capture(call)

    def check() -> None:
        assert torch.equal(replay(), expected), "a gradient captured by hand differs"

    return check


def release() -> None:
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()


def train(model: torch.nn.Module) -> None:
    """Two steps in place: the graphs stay, the weights' values change."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    model.train()
    for _ in range(2):
        optimizer.zero_grad()
        model(**batch(LENGTHS[0])).last_hidden_state.float().square().mean().backward()
        optimizer.step()
    model.eval()
    model.zero_grad()


def run_threads(seconds: float) -> None:
    """Each thread has a model of its own; every other one has a stream of its own too."""
    errors: list[BaseException] = []
    end = time.perf_counter() + seconds

    def work(number: int) -> None:
        try:
            model = make(CoLT5EncoderModel, number)
            while time.perf_counter() < end:
                check_replays(model, random.choice(LENGTHS))
        except BaseException as error:  # noqa: BLE001 - it is raised again where it is seen
            errors.append(error)

    def work_aside(number: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            work(number)

    targets = [work_aside if ON_GPU and number % 2 else work for number in range(3)]
    threads = [threading.Thread(target=target, args=(number,)) for number, target in enumerate(targets)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    print(f"{len(threads)} threads")


def run_rounds(seconds: float) -> None:
    start = time.perf_counter()
    random.seed(0)
    staying, fixed = make(CoLT5EncoderModel, 0), make(CoLT5EncoderModel, 1)
    writer = make(CoLT5ForConditionalGeneration, 2)
    how = {"mode": "reduce-overhead"} if ON_GPU else {"backend": "eager"}
    compiled = torch.compile(copy.deepcopy(fixed), dynamic=False, **how)
    fixed_inputs, prompt = batch(LENGTHS[3]), batch(LENGTHS[2])

    def call_compiled() -> torch.Tensor:
        with torch.no_grad():
            return compiled(**fixed_inputs).last_hidden_state.clone()

    def write() -> torch.Tensor:
        return writer.generate(**prompt, max_new_tokens=8, min_new_tokens=8, cache_implementation="static")

    by_hand: list[Callable[[], None]] = []
    compiled_output = tokens = None
    rounds = 0
    while rounds < 3 or time.perf_counter() - start < seconds:
        for length in random.sample(LENGTHS, 4) if rounds else LENGTHS:
            check_replays(staying, length)
        by_hand.append((capture_forward if rounds % 2 else capture_both)(fixed))
        passing = make(CoLT5EncoderModel, 3 + rounds)
        for length in random.sample(LENGTHS, 2):
            check_replays(passing, length)
        for check in by_hand:
            check()
        # compiled code rounds elsewhere, but always alike: from the third call on it is the same graph
        outputs = [call_compiled() for _ in range(3)]
        compiled_output = outputs[-1] if compiled_output is None else compiled_output
        assert torch.equal(outputs[-1], compiled_output), "the compiled encoder's output has changed"
        written = [write() for _ in range(2)]
        tokens = written[-1] if tokens is None else tokens
        assert torch.equal(written[-1], tokens), "what is generated has changed"
        check_replays(staying, LENGTHS[rounds % len(LENGTHS)])
        # the model that goes may still be busy
        with torch.no_grad():
            passing(**batch(LENGTHS[0]))
        del passing
        if len(by_hand) > 3:
            del by_hand[random.randrange(len(by_hand))]
        release()
        train(staying)
        for length in random.sample(LENGTHS, 3):
            check_replays(staying, length)
        for check in by_hand:
            check()
        rounds += 1
    made = graphs._recordings[staying.encoder].made if staying.encoder in graphs._recordings else 0
    print(f"{rounds} rounds, {made} graphs of the model that stays, {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    {"rounds": run_rounds, "threads": run_threads}[sys.argv[1]](float(sys.argv[2]))
