"""Self-study: a model writes questions about a document and answers them with it in context.

The method is from Cartridges (Eyuboglu et al. 2025, arXiv:2506.06266, section 4).
"""

import dataclasses
import hashlib
import itertools
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from softprompt.backbones.loading import Base
from softprompt.data.task import make_task
from softprompt.data.teacher import opening_with
from softprompt.errors import UserError
from softprompt.experiment.schema import GenerationSettings, TemplateSettings
from softprompt.experiment.templates import template_fields
from softprompt.inference.study_chunks import chunks_of
from softprompt.inference.study_prompts import (
    KINDS,
    SEED_PROMPTS,
    SeedPrompt,
    answer_in,
    question_in,
    same_question,
)
from softprompt.inference.study_reading import Reading

_QUESTION_TOKENS = 40
_ROOM = 128  # tokens for a question and the template around it
_ATTEMPTS_OF_A_KIND = 4  # before the next kind is tried
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
    """Settings that, with the document and the base model, decide the questions and the answers.

    Attributes:
      questions: number of questions.
      seed: random seed for the questions. Answers are decoded greedily.
      max_new_tokens: maximum number of tokens in an answer.
      batch_size: maximum number of questions that are written and answered together.
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

    Every batch of questions depends only on the document, the base model, the template, the
    settings and the earlier batches. So an interrupted study can continue where it stopped.

    Args:
      document: the text.
      base: the base model that writes the questions and answers them. It must be causal.
      template: how the model reads the document and a question before it answers. The document
        replaces the virtual tokens, as for the teacher of `objective: distill`. The input has
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
        self._chunks = chunks_of(document, encoding.offset_mapping)
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
        """Divide the questions into batches.

        Args:
          done: number of questions that exist already. Their complete batches are left out.
        """
        count, size = self._settings.questions, self._settings.batch_size
        batches = [range(begin, min(begin + size, count)) for begin in range(0, count, size)]
        return [batch for batch in batches if batch.stop > done]

    def write(self, done: Sequence[StudyQuestion] = ()) -> Iterator[list[StudyQuestion]]:
        """Write questions and answers, one batch after another.

        Args:
          done: the questions of the first batches, from an earlier call.

        Raises:
          UserError: if the model stops writing new questions.
        """
        taken = {same_question(each.question) for each in done}
        batches = self.batches(len(done))
        if not batches:
            return
        answering = Reading.of(self._base, self._template, self._document)
        asking: dict[int, Reading] = {}
        for batch in batches:
            chunks = sorted({self._chunk_of(i) for i in batch})
            asking = {chunk: asking.get(chunk) or self._asking(chunk) for chunk in chunks}
            written = self._write_batch(batch, asking, answering, taken.copy())
            taken |= {same_question(each.question) for each in written}
            yield written

    def _asking(self, chunk: int) -> Reading:
        """Return the model after it has read a chunk, ready to write questions."""
        begin, end = self._chunks[chunk]
        return Reading.of(self._base, _ASKING, self._document[begin:end].strip())

    def _write_batch(
        self,
        batch: range,
        asking: Mapping[int, Reading],
        answering: Reading,
        taken: set[str],
    ) -> list[StudyQuestion]:
        """Write the questions of a batch. Replace texts that are not usable or not new."""
        asked: dict[int, tuple[str, str]] = {}
        found: dict[int, StudyQuestion] = {}
        attempt = 0
        while len(found) < len(batch):
            while missing := [i for i in batch if i not in asked]:
                if attempt == _MOST_ATTEMPTS:
                    raise UserError(
                        f"base {self._base.name!r} wrote {batch.start} questions and then no new "
                        "ones; ask for fewer questions, or choose a larger base"
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
        self,
        numbers: Sequence[int],
        attempt: int,
        asking: Mapping[int, Reading],
        taken: set[str],
    ) -> dict[int, tuple[str, str]]:
        """Write a question for each number, and return the kind and the text of each usable one."""
        settings = GenerationSettings(
            max_new_tokens=_QUESTION_TOKENS,
            temperature=_TEMPERATURE,
            top_p=_TOP_P,
            stop=[". ", "?", "!", "\n"],
        )
        kinds = [KINDS[(i + attempt // _ATTEMPTS_OF_A_KIND) % len(KINDS)] for i in numbers]
        prompts = [_prompt(*each, attempt) for each in zip(kinds, numbers, strict=True)]
        texts: list[tuple[str, bool]] = []
        of_numbers = zip(numbers, prompts, strict=True)
        for chunk, group in itertools.groupby(of_numbers, lambda each: self._chunk_of(each[0])):
            part = list(group)
            texts += asking[chunk].generate(
                [prompt.text for _, prompt in part],
                settings,
                self._settings.batch_size,
                begins=[f" {prompt.begin}" for _, prompt in part],
                seeds=[_seed(self._settings.seed, i, attempt) for i, _ in part],
            )
        usable = {}
        for i, kind, prompt, (text, ended) in zip(numbers, kinds, prompts, texts, strict=True):
            question = question_in(text, prompt, asking[self._chunk_of(i)].text) if ended else None
            if question is not None and same_question(question) not in taken:
                taken.add(same_question(question))
                usable[i] = kind, question
        return usable

    def _chunk_of(self, number: int) -> int:
        return number * len(self._chunks) // self._settings.questions

    def _require_window(self, opening: int) -> None:
        window, answer = self._base.backbone.arch.context_length, self._settings.max_new_tokens
        if opening + _ROOM + answer > window:
            raise UserError(
                f"the document has {len(self._ids)} tokens; base {self._base.name!r} has a context "
                f"window of {window} tokens and needs {_ROOM} of them for a question and {answer} "
                "for an answer; shorten the document, or choose another base"
            )


def study(
    document: str,
    base: Base,
    template: TemplateSettings | None = None,
    **settings: Any,
) -> list[StudyQuestion]:
    """Write questions about a document with a base model, and answer them with it.

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
            "template: a study writes the fields question and answer; template.input must have the "
            "field {question} and template.target the field {answer}; other fields have no text"
        )


def _prompt(kind: str, number: int, attempt: int) -> SeedPrompt:
    """Return the seed prompt of a question. The prompts of a kind take turns."""
    prompts = SEED_PROMPTS[kind]
    return prompts[(number // len(KINDS) + attempt) % len(prompts)]


def _seed(*numbers: int) -> int:
    return zlib.crc32(repr(numbers).encode())
