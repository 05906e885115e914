"""The configuration: frozen dataclasses that check their fields.

Each field belongs to the part of the program that uses it (`config.model.n_layer`); flags and JSON
files are flat and use nanoGPT's names (`n_layer`). The comment beside a field, or above it with #:,
is its entry in --help.
"""

import re
from dataclasses import dataclass, field
from typing import Literal, get_args

from nanogpt_jax.config.fields import MAX_INT, Checked, require
from nanogpt_jax.errors import InputError

SPLITS = ("train", "val")
MESH_AXES = ("data", "fsdp", "tensor")
ROW_AXES = ("data", "fsdp")  # the axes that split a batch's rows
SCRATCH = "scratch"  # the init_from of random weights
MAX_PAGE_TOKENS = 5000  # in one text of the page (--web), so that no visitor occupies it for long
Architecture = Literal[
    "gpt", "bigram", "head", "multihead", "feedforward", "deep", "residual", "layernorm"
]
LECTURE_MODELS = get_args(Architecture)[1:]  # in the order of "Let's build GPT"


@dataclass(frozen=True)
class ModelConfig(Checked):
    """The model: GPT-2 by default, with newer parts to choose from."""

    architecture: Architecture = "gpt"  # GPT-2's, or a model of "Let's build GPT"
    block_size: int = 1024  # context length in tokens
    #: rows of the token embedding; padding to a multiple of 64 is faster on GPU and TPU; None: the
    #: tokenizer's vocabulary
    vocab_size: int | None = None
    #: tokens that exist in a padded vocabulary (the model never predicts the others); None: as in
    #: the dataset, or all
    known_tokens: int | None = None
    n_layer: int = 12  # Transformer blocks
    n_head: int = 12  # attention heads in each block
    n_embd: int = 768  # width of the residual stream; a multiple of n_head
    dropout: float = 0.0  # dropout rate: 0 for pretraining, 0.1 or more against overfitting
    #: fraction of input tokens that training replaces with random ones: against overfitting,
    #: cheaper than dropout
    token_noise: float = 0.0
    bias: bool = False  # biases in Dense and LayerNorm, like GPT-2; False: a bit better and faster
    #: the MLP's activation: exact GELU (nanoGPT), its tanh approximation (OpenAI's GPT-2), squared
    #: ReLU, or SwiGLU with a hidden layer 8/3 n_embd wide, for the same number of parameters
    activation: Literal["gelu", "gelu_tanh", "relu2", "swiglu"] = "gelu"
    positions: Literal["learned", "rotary"] = "learned"  # position embeddings; rotary: RoPE
    #: attention and MLP read each position together with the one before it; helps small models
    token_shift: bool = False
    #: tokens that each layer's attention sees, a divisor of block_size; 0: all. With fewer, a CPU
    #: can afford a longer block_size
    attention_window: int = 0
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"  # or RMSNorm without parameters
    qk_norm: bool = False  # RMSNorm of each head's queries and keys, which bounds attention scores
    tied_head: bool = True  # share the token embedding with the output head
    zero_init: bool = False  # start residual projections, and an untied head, at zero

    def __post_init__(self):
        super().__post_init__()
        ok = not self.known_tokens or not self.vocab_size or self.known_tokens <= self.vocab_size
        require(ok, self, "known_tokens", f"from 1 to vocab_size={self.vocab_size}")
        twice = self.positions == "rotary"  # it rotates pairs of features
        divisor, name = (2 * self.n_head, "2 n_head") if twice else (self.n_head, "n_head")
        require(self.n_embd % divisor == 0, self, "n_embd", f"a multiple of {name}={divisor}")
        ok = self.block_size % (self.attention_window or 1) == 0
        require(ok, self, "attention_window", f"0 or a divisor of block_size={self.block_size}")
        model = self.architecture
        if model == "gpt":
            return
        # What a model of the lecture would ignore. Its activation is ReLU, whatever the field says.
        required = {"bias": True, "known_tokens": None, **GPT2_PARTS}
        required |= {} if model == "layernorm" else {"dropout": 0.0}
        required |= {} if model in ("deep", "residual", "layernorm") else {"n_layer": 1}
        required |= {"n_head": 1} if model in ("bigram", "head") else {}
        for name, value in required.items():
            requirement = f"{value} for the lecture's {model} model, as in --config lecture-{model}"
            require(getattr(self, name) == value, self, name, requirement)

    @property
    def hidden_size(self) -> int:
        """Width of the MLP's hidden layer."""
        return max(1, self.n_embd // 3) * 8 if self.activation == "swiglu" else 4 * self.n_embd

    @property
    def n_keys(self) -> float:
        """Keys that a query is compared with, on average; masked ones are computed too."""
        window = self.attention_window or self.block_size
        return 2 * window - window**2 / self.block_size

    @property
    def mlp_in_features(self) -> int:
        """Output features of the MLP's first layer: the hidden ones, and SwiGLU's gates."""
        return self.hidden_size * (2 if self.activation == "swiglu" else 1)


REGULARIZATION = "dropout", "token_noise"  # in training only, so weights do not determine them
# GPT-2's choice of each part that has newer alternatives: the defaults above.
_PARTS = "activation positions token_shift attention_window norm qk_norm tied_head zero_init"
GPT2_PARTS = {name: getattr(ModelConfig, name) for name in _PARTS.split()}


@dataclass(frozen=True)
class OptimConfig(Checked):
    """The optimizer and the learning rate schedule."""

    #: AdamW, or Muon for the matrices of the blocks with Nesterov AdamW for everything else
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 6e-4  # peak rate, after warm-up; one value serves AdamW and Muon
    muon_momentum: float = 0.95  # Muon's momentum; lower suits short runs
    #: decay from learning_rate to min_lr: cosine, or warm-up-stable-decay (wsd), which stays
    #: constant and then falls linearly
    schedule: Literal["cosine", "wsd"] = "cosine"
    cooldown: float = 0.4  # with wsd, the fraction of steps after warm-up in which the rate falls
    min_lr: float = 6e-5  # final learning rate; a tenth of learning_rate is a good choice
    warmup_iters: int = 2000  # steps of linear warm-up
    lr_decay_iters: int | None = None  # step at which the rate reaches min_lr; None: max_iters
    decay_lr: bool = True  # False: keep learning_rate constant, without warm-up
    weight_decay: float = 0.1  # decay of matrices and embeddings; biases and norms have none
    beta1: float = 0.9  # AdamW's decay rate of the mean gradient
    beta2: float = 0.95  # AdamW's decay rate of the mean squared gradient; higher for small batches
    grad_clip: float = 1.0  # clip the gradient's global norm to this value; 0: no clipping

    def __post_init__(self):
        super().__post_init__()
        if self.decay_lr and self.min_lr > self.learning_rate:  # the rate would rise above the peak
            raise InputError(
                f"min_lr must be at most learning_rate = {self.learning_rate:g}, got "
                f"{self.min_lr:g}: add --min_lr {self.learning_rate / 10:g}"
            )


def mesh_sizes(text: str) -> tuple[int, int, int]:
    """Return the sizes of the axes data, fsdp and tensor of a mesh like "data=2,fsdp=4".

    An omitted axis has size 1, but data takes all remaining devices (-1) unless another axis does.
    """
    parts = [part.partition("=") for part in text.replace(" ", "").split(",") if part]
    sizes = {axis: int(size) for axis, _, size in parts if re.fullmatch(r"-1|[1-9]\d{0,8}", size)}
    n_remaining = [*sizes.values()].count(-1)
    if len(sizes) < len(parts) or not sizes.keys() <= {*MESH_AXES} or n_remaining > 1:
        raise InputError(
            "mesh must give axes a number of devices, or one of them -1 for all that remain, like "
            f"data=-1,fsdp=1,tensor=1, got {text!r}"
        )
    return sizes.get("data", 1 if n_remaining else -1), sizes.get("fsdp", 1), sizes.get("tensor", 1)


@dataclass(frozen=True)
class ComputeConfig(Checked):
    """How the devices compute it. The results are the same up to rounding."""

    #: type of activations and matrix products; parameters, optimizer and loss stay in float32;
    #: auto: bfloat16 if the chip supports it, else float16 if it has units for that (a T4), else
    #: float32; float16 scales the loss by itself
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    #: attention kernel: xla (any device), cudnn (NVIDIA), splash (TPU); auto: the fastest that the
    #: chip and the model allow
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    remat: bool = False  # recompute activations in the backward pass: slower, but far less memory
    #: compute logits in this many pieces, a divisor of block_size: slower, but less memory; 0: as
    #: few as fit
    loss_chunks: int = 0
    #: devices along each axis, like data=-1,fsdp=1,tensor=1 (-1: all that remain); empty: data
    #: parallelism over as many devices as divide batch_size
    mesh: str = ""

    def __post_init__(self):
        super().__post_init__()
        mesh_sizes(self.mesh)


@dataclass(frozen=True)
class TrainConfig(Checked):
    """All settings of a training run."""

    config: str = "small"  # a preset, or a JSON file of these fields
    out_dir: str | None = None  # folder of the run; None: out/CONFIG, with the name of your dataset
    #: shakespeare_char, shakespeare (GPT-2 tokens), pydocs, tinystories, openwebtext or
    #: fineweb-edu; a text, JSON or Parquet file, or a folder of them; or a folder with train.bin
    #: and val.bin; None: shakespeare_char, or Python's manual if it cannot be downloaded
    dataset: str | None = None
    data_dir: str = "data"  # folder of prepared datasets
    #: char, gpt2, bpe (trained on your text, with vocab_size tokens) or a tokenizer.json; None:
    #: as the dataset or init_from needs; for your own files, char for text, gpt2 for the rest
    tokenizer: str | None = None
    text_key: str = "text"  # the key or column of the text in JSON and Parquet files
    #: initial weights: scratch (random), gpt2, gpt2-medium, gpt2-large, gpt2-xl, or the folder of a
    #: Hugging Face GPT-2 or of a run, which determine the model's shape and tokenizer; a smaller
    #: block_size crops them
    init_from: str = SCRATCH
    batch_size: int = 12  # sequences in a micro-batch, over all devices
    gradient_accumulation_steps: int = 1  # micro-batches in an update
    max_iters: int = 2000  # updates in the whole run
    #: train for about this many minutes, start-up included, instead of max_iters: the speed is
    #: measured first, and config.json has the max_iters that follow; 0: max_iters
    minutes: float = 0.0
    eval_interval: int = 250  # updates between evaluations; each one saves a checkpoint
    eval_first: bool = True  # also evaluate before the first update
    eval_iters: int = 0  # batches in an evaluation, always the same; 0: the whole validation split
    log_interval: int = 10  # updates between lines of metrics.jsonl
    sample_chars: int = 80  # characters of text shown after each evaluation; 0: none
    #: evaluate and exit: the run's newest checkpoint, or the weights of init_from if out_dir names
    #: no run
    eval_only: bool = False
    seed: int = 1337  # seed of the initial weights, batches and dropout
    tensorboard: bool = False  # also log to OUT_DIR/tensorboard; needs the extra tensorboard
    wandb: bool = False  # also log to Weights & Biases; needs the extra wandb
    overwrite: bool = False  # delete the run in out_dir and start over
    compile_cache: str = ""  # folder for compiled functions; off: none; empty: your cache folder
    #: compile for GPUs or TPUs that are not attached, like h100, 8xa100 or v5e:4x4, report whether
    #: the run fits and what its program does, and exit
    compile_for: str = ""
    #: with several processes: HOST:PORT of the first one, or auto on a Cloud TPU pod; empty: a
    #: single process, or what Slurm says
    coordinator_address: str = ""
    num_processes: int = 0  # how many processes; 0: what Slurm and the like say; 1: only this one
    process_id: int = -1  # with several processes: the number of this one; -1: JAX finds out
    heartbeat_timeout_s: int = 100  # with several processes: all stop if one is silent for so long
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)

    def __post_init__(self):
        super().__post_init__()
        product = "batch_size x gradient_accumulation_steps x block_size"
        if self.tokens_per_iter > MAX_INT:
            raise InputError(f"{product} must be at most {MAX_INT}, got {self.tokens_per_iter}")
        divides = self.model.block_size % (self.compute.loss_chunks or 1) == 0
        divisor = f"a divisor of block_size={self.model.block_size}"
        require(divides, self.compute, "loss_chunks", divisor)
        ok = self.optim.optimizer == "adamw" or self.model.architecture == "gpt"
        require(ok, self.optim, "optimizer", "adamw for a model of the lecture")
        address = self.coordinator_address
        port = re.fullmatch(r".+:(\d{1,5})", address)
        ok = address in ("", "auto") or (port is not None and 1 <= int(port[1]) <= 65535)
        require(ok, self, "coordinator_address", "HOST:PORT or auto")
        given = port is not None, self.num_processes > 0, self.process_id >= 0
        is_alone = self.num_processes == 1 and not address and self.process_id < 0
        if any(given) and not all(given) and not is_alone:
            raise InputError(
                "coordinator_address, num_processes and process_id must be given together, like "
                "--coordinator_address 10.0.0.1:8476 --num_processes 2 --process_id 0; leave all "
                "three out on Slurm and TPU pods, where JAX finds them"
            )
        ok = self.process_id < max(1, self.num_processes)
        require(ok, self, "process_id", f"below num_processes={self.num_processes}")

    @property
    def tokens_per_iter(self) -> int:
        """Tokens in one update."""
        return self.gradient_accumulation_steps * self.batch_size * self.model.block_size


@dataclass(frozen=True)
class SampleConfig(Checked):
    """What to generate, and how."""

    out_dir: str | None = None  # folder of the run; None: the newest run under out/
    #: sample from these weights instead of a run: gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a
    #: Hugging Face GPT-2 folder
    init_from: str | None = None
    checkpoint: Literal["best", "latest"] = "best"  # best: the lowest validation loss
    start: str | None = None  # prompt; FILE:path reads a file, - standard input; None: a newline
    num_samples: int = 10  # samples to draw
    max_new_tokens: int = 500  # tokens in each sample; -1 with --stream: no limit, until Ctrl-C
    temperature: float = 0.8  # below 1 is safer, above 1 is wilder; 0: always the likeliest token
    top_k: int = 200  # sample from the k likeliest tokens; 0: from all
    top_p: float = 1.0  # sample from the likeliest tokens with this total probability; 1: from all
    seed: int = 1337  # the n-th sample of a seed is the same however many are drawn
    stop: str | None = None  # end a sample before the first occurrence of this text
    stream: bool = False  # print text as it is generated, one sample after the other
    #: past block_size, recompute the last block_size tokens for every token, as nanoGPT does
    #: (slow); False: keep the last half of the window and continue from there
    exact_window: bool = False
    #: as in training; auto: bfloat16 or float16 if the chip has units for it, else float32
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    compile_cache: str = ""  # folder for compiled functions; off: none; empty: your cache folder
    #: open a web page instead: live text, next-token probabilities, attention, the loss curve
    web: bool = False
    #: with --web: the address to listen on; 0.0.0.0 lets anyone who can reach this machine in
    host: str = "127.0.0.1"
    port: int = 7860  # with --web: the port; 0: any free one

    def __post_init__(self):
        super().__post_init__()
        ok = self.init_from is None or self.out_dir is None
        require(ok, self, "init_from", "left out if out_dir names a run")
        ok = self.max_new_tokens >= 1 or (self.max_new_tokens == -1 and self.stream)
        require(ok, self, "max_new_tokens", "at least 1, or -1 together with --stream")
        ok = not self.web or 1 <= self.max_new_tokens <= MAX_PAGE_TOKENS
        require(ok, self, "max_new_tokens", f"from 1 to {MAX_PAGE_TOKENS} with --web")
        ok = self.stop is None or not self.web
        require(ok, self, "stop", "left out with --web, whose page has a stop button")
