"""Self-study: a model writes questions about a document, and answers them with the document.

The method is from Cartridges (Eyuboglu et al. 2025, arXiv:2506.06266, section 4).
"""

import dataclasses
import hashlib
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from softprompt.backbones.loading import Base, Prefix
from softprompt.data.chat import turn_end
from softprompt.data.records import Record
from softprompt.data.task import Task, make_task
from softprompt.data.teacher import opening_with
from softprompt.errors import UserError
from softprompt.experiment.schema import GenerationSettings, TemplateSettings
from softprompt.experiment.templates import template_fields
from softprompt.generation.engine import Engine, Request
from softprompt.inference.study_prompts import (
    KINDS,
    SEED_PROMPTS,
    SeedPrompt,
    answer_in,
    question_in,
    same_question,
)
from softprompt.objectives.distillation import read

_CHUNK_TOKENS = 384  # at most, in the part of the document that a question is about
_QUESTION_TOKENS = 40
_ROOM = 128  # tokens for a question and the template around it
_ATTEMPTS_OF_A_KIND = 4  # then the next kind is tried
_MOST_ATTEMPTS = _ATTEMPTS_OF_A_KIND * len(KINDS)
_ASKING = TemplateSettings(input="{prompt}\n\n{question}\n\n1.")
_TEMPERATURE, _TOP_P = 0.7, 0.95


class StudyQuestion(NamedTuple):
    """A question about a document, with its answer.

    Attributes:
      question: a question or a request.
      answer: what the base model answers when it reads the whole document.
      kind: the kind of seed prompt, one of `study_prompts.KINDS`.
      chunk: the number of the chunk of the document that the question is about, from 1.

    Examples:
      >>> StudyQuestion("Who runs the mill?", "Ada Holm runs it.", "question", 1).answer
      'Ada Holm runs it.'
    """

    question: str
    answer: str
    kind: str
    chunk: int


@dataclasses.dataclass(frozen=True)
class StudySettings:
    """What decides the questions and the answers, besides the document and the base model.

    Attributes:
      questions: their number.
      seed: of the questions. Answers are greedy.
      max_new_tokens: the most tokens of an answer.
      batch_size: the most questions that are written and answered together.
    """

    questions: int = 256
    seed: int = 0
    max_new_tokens: int = 128
    batch_size: int = 16


def study_template(base: Base) -> TemplateSettings:
    """Return a template in which a document stands before a question, at `{prompt}`."""
    if base.tokenizer.chat_template:
        return TemplateSettings(chat=True, input="{prompt}\n\n{question}", target="{answer}")
    return TemplateSettings(input="{prompt}\n\nQuestion: {question}\nAnswer:", target=" {answer}")


class Study:
    """Questions about one document.

    Every batch of questions is a function of the document, the settings and the batches before it.
    So an interrupted study can go on where it stopped.

    Args:
      document: the text.
      base: the base model that writes questions and answers them. It is a causal model.
      template: how the answering model reads document and question. The document stands in the
        place of the virtual tokens, as for the teacher of `objective: distill`. The input has
        the field `question` and the target has the field `answer`.
      settings: number of questions, seed and sizes.

    Raises:
      UserError: if the template has other fields, or the document does not fit the context window.
    """

    def __init__(
        self,
        document: str,
        base: Base,
        template: TemplateSettings | None = None,
        settings: StudySettings | None = None,
    ):
        self._base, self._settings = base, settings or StudySettings()
        self._template = template or study_template(base)
        self._document = document
        if base.backbone.separate_targets:
            raise UserError(f"base {base.name!r}: an encoder-decoder cannot study a document")
        if self._settings.questions < 1:
            raise UserError(f"questions {self._settings.questions}: must be 1 or more")
        _require_fields(self._template)
        encoding = base.tokenizer(document, add_special_tokens=False, return_offsets_mapping=True)
        base.require_embeddings(encoding.input_ids, "the document")
        self._ids = list(encoding.input_ids)
        self._chunks = _chunks(document, encoding.offset_mapping)
        if not self._chunks:
            raise UserError("the document has no text")
        marked = make_task(base, self._template, None, virtual_tokens=1)
        if None in marked.pieces:
            raise UserError("template.input: {prompt} must come before {question}")
        self._require_window(len(opening_with(self._ids, marked)))

    def __repr__(self) -> str:
        return f"Study({len(self._ids)} tokens, {self._settings.questions} questions)"

    @property
    def description(self) -> dict[str, Any]:
        """All that decides the questions and the answers."""
        return {
            "document": hashlib.sha256(self._document.encode()).hexdigest(),
            "base": self._base.name,
            "fingerprint": self._base.fingerprint,
            "compute": self._base.compute.model_dump(mode="json"),
            "template": self._template.model_dump(mode="json"),
            "chunks": [end for _, end in self._chunks],
            "seed_prompts": hashlib.sha256(repr(SEED_PROMPTS).encode()).hexdigest(),
            **dataclasses.asdict(self._settings),
        }

    def batches(self, done: int = 0) -> list[range]:
        """Divide the questions into batches that are about one chunk each.

        Args:
          done: number of questions that exist already. Batches that they complete are left out.
        """
        count, size = self._settings.questions, self._settings.batch_size
        chunk_of = np.array([self._chunk_of(i) for i in range(count)])
        batches = []
        for chunk in range(len(self._chunks)):
            (numbers,) = np.nonzero(chunk_of == chunk)
            for part in np.array_split(numbers, -(-len(numbers) // size) or 1):
                batches += [range(int(part[0]), int(part[-1]) + 1)] if len(part) else []
        return [batch for batch in batches if batch.stop > done]

    def write(self, done: Sequence[StudyQuestion] = ()) -> Iterator[list[StudyQuestion]]:
        """Write questions and answers, one batch after another.

        Args:
          done: the questions of the first batches, from an earlier call.

        Raises:
          UserError: if the model writes no more new questions.
        """
        taken = {same_question(each.question) for each in done}
        answering: _Reading | None = None
        asking: tuple[int, _Reading] | None = None
        for batch in self.batches(len(done)):
            chunk = self._chunk_of(batch.start)
            if answering is None:
                answering = self._reading(self._template, self._document)
            if asking is None or asking[0] != chunk:
                begin, end = self._chunks[chunk]
                text = self._document[begin:end].strip()
                asking = chunk, self._reading(_ASKING, text)
            written = self._write_batch(batch, asking[1], answering, taken.copy())
            taken |= {same_question(each.question) for each in written}
            yield written

    def _write_batch(
        self, batch: range, asking: "_Reading", answering: "_Reading", taken: set[str]
    ) -> list[StudyQuestion]:
        """Write the questions of a batch; replace those that are no questions or not new."""
        asked: dict[int, tuple[str, str]] = {}
        found: dict[int, StudyQuestion] = {}
        attempt = 0
        while len(found) < len(batch):
            while missing := [i for i in batch if i not in asked]:
                if attempt == _MOST_ATTEMPTS:
                    raise UserError(
                        f"base {self._base.name!r} wrote {batch.start} questions and then no new "
                        "one; ask for fewer questions, or choose a larger base"
                    )
                asked |= self._ask(missing, attempt, asking, taken)
                attempt += 1
            open_ = [i for i in batch if i not in found]
            answers = answering.generate(
                [asked[i][1] for i in open_],
                GenerationSettings(max_new_tokens=self._settings.max_new_tokens),
                self._settings.batch_size,
            )
            for i, (text, _) in zip(open_, answers, strict=True):
                kind, question = asked[i]
                if answer := answer_in(text):
                    found[i] = StudyQuestion(question, answer, kind, self._chunk_of(i) + 1)
                else:
                    del asked[i]
        return [found[i] for i in batch]

    def _ask(
        self, numbers: Sequence[int], attempt: int, asking: "_Reading", taken: set[str]
    ) -> dict[int, tuple[str, str]]:
        """Let the model write a question for each number; return kind and text of the usable."""
        kinds = [KINDS[(i + attempt // _ATTEMPTS_OF_A_KIND) % len(KINDS)] for i in numbers]
        prompts = [_prompt(*each, attempt) for each in zip(kinds, numbers, strict=True)]
        settings = GenerationSettings(
            max_new_tokens=_QUESTION_TOKENS,
            temperature=_TEMPERATURE,
            top_p=_TOP_P,
            stop=[". ", "?", "!", "\n"],
        )
        texts = asking.generate(
            [prompt.text for prompt in prompts],
            settings,
            self._settings.batch_size,
            begins=[f" {prompt.begin}" for prompt in prompts],
            seeds=[_seed(self._settings.seed, i, attempt) for i in numbers],
        )
        usable = {}
        for i, kind, prompt, (text, ended) in zip(numbers, kinds, prompts, texts, strict=True):
            question = question_in(text, prompt, asking.text) if ended else None
            if question is not None and same_question(question) not in taken:
                taken.add(same_question(question))
                usable[i] = kind, question
        return usable

    def _reading(self, template: TemplateSettings, text: str) -> "_Reading":
        """Let the model read a text in the place of the virtual tokens of a template."""
        ids = self._base.tokenizer(text, add_special_tokens=False).input_ids
        marked = make_task(self._base, template, None, virtual_tokens=1)
        opening = opening_with(ids, marked)
        task = dataclasses.replace(marked, opening=opening)
        end = turn_end(self._base.tokenizer) if template.chat else ""
        stop = [end] if end not in ("", self._base.tokenizer.eos_token) else []
        return _Reading(text, task, read(self._base.backbone, opening), stop)

    def _chunk_of(self, number: int) -> int:
        return number * len(self._chunks) // self._settings.questions

    def _require_window(self, opening: int) -> None:
        window, answer = self._base.backbone.arch.context_length, self._settings.max_new_tokens
        if opening + _ROOM + answer > window:
            raise UserError(
                f"the document has {len(self._ids)} tokens; base {self._base.name!r} has a context "
                f"window of {window} tokens, and needs {_ROOM} of them for a question and {answer} "
                "for an answer; shorten the document, or choose another base"
            )


@dataclasses.dataclass(frozen=True)
class _Reading:
    """A base model that has read a text.

    Attributes:
      text: the text.
      task: its opening contains the text.
      prefix: of the opening.
      stop: the texts that end an answer, besides the end-of-text token.
    """

    text: str
    task: Task
    prefix: Prefix
    stop: Sequence[str]

    def generate(
        self,
        questions: Sequence[str],
        settings: GenerationSettings,
        batch_size: int,
        *,
        begins: Sequence[str] = (),
        seeds: Sequence[int] = (),
    ) -> list[tuple[str, bool]]:
        """Return what the model writes after each question, and whether it came to an end.

        Args:
          questions: what the model is asked.
          settings: how it writes.
          batch_size: the most questions in a batch.
          begins: what each answer begins with; it is not part of the result. Empty: nothing.
          seeds: of each text. Empty: the seed of the settings.
        """
        base, task = self.task.base, self.task
        settings = settings.model_copy(update={"stop": [*settings.stop, *self.stop]})
        task = task.for_generation(settings.max_new_tokens, self.prefix.length)
        records = [Record({"question": text}, "question") for text in questions]
        examples = list(task.examples(records, with_answer=False))
        if any(example.truncated for example in examples):
            raise UserError(f"base {base.name!r}: its context window is too short for a question")
        begun = [
            [*example.input, *base.tokenizer(begin, add_special_tokens=False).input_ids]
            for example, begin in zip(examples, begins or [""] * len(examples), strict=True)
        ]
        requests = [
            Request(tokens, self.prefix, task.opening, seed)
            for tokens, seed in zip(begun, seeds or [None] * len(begun), strict=True)
        ]
        results = Engine(base.backbone, base.tokenizer, settings).generate(requests, batch_size)
        return [(result.text, result.ended[0]) for result in results]


def study(
    document: str,
    base: Base,
    template: TemplateSettings | None = None,
    **settings: Any,
) -> list[StudyQuestion]:
    """Let a base model write questions about a document, and answer them.

    Args:
      document: the text.
      base, template: see `Study`.
      settings: fields of `StudySettings`.

    Returns:
      The questions with their answers, grouped by chunk.

    Raises:
      UserError: see `Study` and `Study.write`.

    Examples:
      >>> from softprompt.inference.study import study
      >>> base = load_base("smollm2-135m-instruct")
      >>> questions = study(Path("manual.txt").read_text(), base, questions=64, seed=1)
      >>> rows = [question._asdict() for question in questions]
    """
    batches = Study(document, base, template, StudySettings(**settings)).write()
    return [question for batch in batches for question in batch]


def _require_fields(template: TemplateSettings) -> None:
    fields = template_fields(template.input), template_fields(template.target)
    if fields != (["question"], ["answer"]):
        raise UserError(
            "template: a study writes the fields question and answer; template.input must have "
            "{question} and template.target {answer}, and no other fields"
        )


def _chunks(document: str, offsets: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Divide a document into chunks that end where a paragraph, a line or a sentence ends.

    Args:
      document: the text.
      offsets: begin and end of each of its tokens.

    Returns:
      Begin and end of each chunk, in characters.
    """
    count = -(-len(offsets) // _CHUNK_TOKENS)
    chunks, begin, first = [], 0, 0
    for left in range(count, 0, -1):
        end = len(document)
        if left > 1:  # as many of the tokens that are left as every later chunk
            most = first + (len(offsets) - first) // left
            end = _last_break(document, begin, offsets[most][0])
        chunks.append((begin, end))
        begin = end
        first = next((i for i, (_, stop) in enumerate(offsets) if stop > begin), len(offsets))
    return [(begin, end) for begin, end in chunks if document[begin:end].strip()]


def _last_break(text: str, begin: int, end: int) -> int:
    """Return where the last paragraph, line, sentence or word in the second half of a part ends."""
    for mark in ("\n\n", "\n", ". ", " "):
        found = text.rfind(mark, begin + (end - begin) // 2, end)
        if found >= 0:
            return found + len(mark)
    return end


def _prompt(kind: str, number: int, attempt: int) -> SeedPrompt:
    """Return the seed prompt of a question. The prompts of a kind take turns."""
    prompts = SEED_PROMPTS[kind]
    return prompts[(number // len(KINDS) + attempt) % len(prompts)]


def _seed(*numbers: int) -> int:
    return zlib.crc32(repr(numbers).encode())
