"""The benchmarks, and the protocol: how often a question is asked, how answers are sampled, what counts as right."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Kind = Literal["math", "choice", "instructions", "code"]

MATH_TEMPLATE = "{question}\n\nPlease reason step by step, and put your final answer within \\boxed{}."
CHOICE_TEMPLATE = (
    "Answer the following multiple choice question. The last line of your response should be of the following format: "
    "'ANSWER: [LETTER]' (without quotes) where [LETTER] is one of {letters}. Think step by step before answering.\n\n"
    "{question}\n\n{choices}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """One benchmark: what it is called, where its questions come from and how they are graded."""

    title: str
    kind: Kind
    dataset: str
    """Name of the data set on the Hugging Face Hub."""
    num_questions: int | None
    """Of the set that the paper's digits belong to; None where they do not tell."""
    samples: int
    """Responses to a question, unless the user gives another number."""
    metrics: tuple[str, ...]
    """What a response is scored on; the first one is the benchmark's score."""
    integer_answers: bool = False
    """Whether only an integer is an answer."""


_STRICT_LENIENT = ("accuracy", "lenient")
BENCHMARKS: dict[str, Benchmark] = {
    "aime24": Benchmark(
        title="AIME 2024", kind="math", dataset="HuggingFaceH4/aime_2024", num_questions=30, samples=32,
        metrics=_STRICT_LENIENT, integer_answers=True,
    ),
    "aime25": Benchmark(
        title="AIME 2025", kind="math", dataset="math-ai/aime25", num_questions=30, samples=32,
        metrics=_STRICT_LENIENT, integer_answers=True,
    ),
    "amc23": Benchmark(
        title="AMC 2023", kind="math", dataset="math-ai/amc23", num_questions=40, samples=32, metrics=_STRICT_LENIENT,
    ),
    "gpqa_diamond": Benchmark(
        title="GPQA Diamond", kind="choice", dataset="Idavidrein/gpqa (gpqa_diamond.csv)", num_questions=198, samples=4,
        metrics=_STRICT_LENIENT,
    ),
    "mmlu_redux": Benchmark(
        title="MMLU-Redux 2", kind="choice", dataset="edinburgh-dawg/mmlu-redux-2.0", num_questions=None, samples=1,
        metrics=_STRICT_LENIENT,
    ),
    "ifbench": Benchmark(
        title="IFBench", kind="instructions", dataset="allenai/IFBench_test", num_questions=294, samples=1,
        metrics=("prompt_strict", "prompt_loose", "instruction_strict", "instruction_loose"),
    ),
    "livecodebench_v6": Benchmark(
        title="LiveCodeBench v6", kind="code", dataset="livecodebench/code_generation_lite (test6.jsonl)",
        num_questions=175, samples=1, metrics=("accuracy",),
    ),
}  # fmt: skip
"""Name on the command line -> benchmark, in the order of the tables."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are drawn.  Every value is sent with every request, so a server's or a model's own defaults (those of
    generation_config.json) never apply."""

    temperature: float
    top_p: float
    top_k: int = -1
    """-1: all tokens."""
    max_tokens: int = 32768
    """Of a response, thinking included."""


PROFILES: dict[str, Sampling] = {
    "paper": Sampling(temperature=1.0, top_p=0.7),
    "r1-card": Sampling(temperature=0.6, top_p=0.95),
    "qwen3": Sampling(temperature=0.6, top_p=0.95, top_k=20),
}
"""The paper does not say how it samples: ``paper`` is its authors' validation script; the other two are what the model
cards of DeepSeek-R1 and Qwen3 ask for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Protocol:
    """Everything besides model and data that can change a score."""

    sampling: Sampling = PROFILES["paper"]
    samples: Mapping[str, int] = field(
        default_factory=lambda: {name: benchmark.samples for name, benchmark in BENCHMARKS.items()}
    )
    """Responses to a question, by benchmark."""
    limit: int | None = None
    """Only the first questions of each benchmark."""
    truncated: Literal["wrong", "graded"] = "wrong"
    """What a response is that was cut off at ``max_tokens``."""
    math_template: str = MATH_TEMPLATE
    choice_template: str = CHOICE_TEMPLATE
    choice_seed: int = 0
    """Of the order of GPQA's options, together with the question's text."""
    mmlu_redux_rows: Literal["ok", "all"] = "ok"
    """``ok``: rows whose error_type is ok; ``all``: the others too, with their corrected answers."""
    code_timeout_s: float = 6.0
    """Of one test of a program."""
    code_memory_mib: int = 4096
    chat_template_arguments: Mapping[str, Any] = field(default_factory=dict)
    """Given to the model's chat template, for example ``{"enable_thinking": false}``."""

    def settings_of(self, name: str) -> dict[str, Any]:
        """Return what can change the score of one benchmark, ready for JSON: two runs with the same are comparable."""
        own = {
            "math": ("math_template",),
            "choice": ("choice_template", "mmlu_redux_rows" if name == "mmlu_redux" else "choice_seed"),
            "instructions": (),
            "code": ("code_timeout_s", "code_memory_mib"),
        }[BENCHMARKS[name].kind]
        return {
            "samples": self.samples[name],
            "sampling": asdict(self.sampling),
            "chat_template_arguments": dict(self.chat_template_arguments),
            **{key: getattr(self, key) for key in ("limit", "truncated", *own)},
        }

    def to_json(self) -> dict[str, Any]:
        """Return this protocol as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Protocol:
        """Return the protocol that :meth:`to_json` gave."""
        return cls(**{**values, "sampling": Sampling(**values["sampling"])})
