"""Cold start: curated trajectories as token sequences, and supervised fine-tuning on them with TRL's SFTTrainer.

Between curation and HDPO: it teaches a base model the tool habit and the format that RL then prices. Only what the
model itself wrote carries loss; the question, the tools' results and everything that a template puts between are
context. Where a trajectory holds the exact token ids of the model that is trained, those are used; text that another
model wrote is rendered by the student's own chat template, turn by turn. Rows go through an Arrow file, so there may be
more of them than memory holds.

Source: arXiv:2604.08545, the SFT stage.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from langchain_core.messages import BaseMessage, convert_to_openai_messages, messages_from_dict
from langchain_core.utils.function_calling import convert_to_openai_tool

from metis_agent.errors import InputError
from metis_agent.hdpo.config import last_checkpoint, save_whole
from metis_agent.hdpo.settings import SftSettings
from metis_agent.hdpo.token_sequences import segments
from metis_agent.types import Trajectory

__all__ = ["IGNORED", "SftData", "SftRow", "Source", "sft_rows", "train_sft", "write_sft_data"]

IGNORED = -100
"""The label of a token without loss."""

Source = Literal["auto", "recorded", "template"]


@dataclass(frozen=True, kw_only=True)
class SftRow:
    """One token sequence to learn from; both tuples have the same length T."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    """The token where the model wrote it, `IGNORED` elsewhere."""

    @property
    def learnt(self) -> int:
        """Tokens that carry loss."""
        return sum(label != IGNORED for label in self.labels)


def sft_rows(
    trajectory: Trajectory, tokenizer: Any, *, tools: Sequence[Any] = (), source: Source = "auto"
) -> tuple[SftRow, ...]:
    """A trajectory's rows: one, or several where its prompts do not extend each other; each own token is in one.

    Args:
        trajectory: what to learn from.
        tokenizer: the student's.
        tools: as the agent offered them (LangChain tools, functions or schemas); for the template only.
        source: "recorded" token ids, the student's "template", or "auto": recorded ids where they are this
            tokenizer's, that is where they decode to the text of the record.

    Raises:
        InputError: the run failed, has images or no reply, or its ids are asked for and are missing or foreign.
    """
    if trajectory.status != "finished":
        raise InputError(
            f"trajectory {trajectory.id!r} failed ({trajectory.error}); there is nothing to learn from it."
        )
    fault = _foreign(trajectory, tokenizer) if source != "template" else "the template is asked for"
    if not fault:
        return tuple(
            SftRow(
                input_ids=segment.prompt_ids + segment.completion_ids,
                labels=(IGNORED,) * len(segment.prompt_ids)
                + tuple(
                    token if own else IGNORED for token, own in zip(segment.completion_ids, segment.mask, strict=True)
                ),
            )
            for segment in segments(trajectory)
        )
    if source == "recorded":
        raise InputError(f"trajectory {trajectory.id!r}: {fault}. Use source='auto' to render its text instead.")
    return _rendered(trajectory, tokenizer, tools)


def _foreign(trajectory: Trajectory, tokenizer: Any) -> str:
    """Why the recorded ids are not this tokenizer's; empty where they are."""
    if not trajectory.calls or any(call.completion_ids is None or call.prompt_ids is None for call in trajectory.calls):
        return "it holds no token ids"
    size = len(tokenizer)
    for call in trajectory.calls:
        ids = call.completion_ids or ()
        if not ids or max(ids) >= size or max(call.prompt_ids or (0,)) >= size:
            return f"its ids are not of a vocabulary of {size} tokens"
        written = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        said = [call.text.strip(), *(str(asked.get("name", "")) for asked in call.tool_calls)]
        if not all(text in written for text in said):
            return f"step {call.step} decodes to {written[:100]!r}, and the record says {call.text[:100]!r}"
    return ""


# --- by the student's template ---------------------------------------------------------------------------------


def _rendered(trajectory: Trajectory, tokenizer: Any, tools: Sequence[Any]) -> tuple[SftRow, ...]:
    chat = _chat(trajectory)
    offered = [tool if isinstance(tool, dict) else convert_to_openai_tool(tool) for tool in tools] or None

    def render(messages: Sequence[Mapping[str, Any]], *, reply: bool) -> str:
        return str(tokenizer.apply_chat_template(messages, tools=offered, tokenize=False, add_generation_prompt=reply))

    rows: list[_Draft] = []
    for position, message in enumerate(chat):
        if message["role"] != "assistant":
            continue
        prompt, whole = render(chat[:position], reply=True), render(chat[: position + 1], reply=False)
        if not whole.startswith(prompt):
            raise InputError(
                f"trajectory {trajectory.id!r}: the chat template writes a finished reply otherwise than one that is "
                "being written, so it can't be told which tokens the model writes. Mend the template."
            )
        if not rows or not prompt.startswith(rows[-1].text):
            rows.append(_Draft())  # the history was rewritten, as by templates that drop earlier reasoning
        rows[-1].add(prompt[len(rows[-1].text) :], own=False, tokenizer=tokenizer)
        rows[-1].add(whole[len(prompt) :], own=True, tokenizer=tokenizer)
    if not rows:
        raise InputError(f"trajectory {trajectory.id!r} holds no reply of the model.")
    return tuple(SftRow(input_ids=tuple(row.ids), labels=tuple(row.labels)) for row in rows)


@dataclass(kw_only=True)
class _Draft:
    """A row in the making."""

    text: str = ""
    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)

    def add(self, text: str, *, own: bool, tokenizer: Any) -> None:
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        end = tokenizer.eos_token_id
        # A reply ends with its end-of-turn token; what the template puts after it nobody wrote.
        written = len(ids) - ids[::-1].index(end) if own and end in ids else len(ids) if own else 0
        self.text += text
        self.ids += ids
        self.labels += ids[:written] + [IGNORED] * (len(ids) - written)


def _chat(trajectory: Trajectory) -> list[dict[str, Any]]:
    """The messages as chat templates read them."""
    messages: list[BaseMessage] = messages_from_dict([dict(message) for message in trajectory.messages])
    chat: list[dict[str, Any]] = convert_to_openai_messages(messages, text_format="string")
    for message in chat:
        if not isinstance(message.get("content") or "", str):
            raise InputError(f"trajectory {trajectory.id!r} has images; only text can be rendered for SFT so far.")
        message["content"] = message.get("content") or ""
        for call in message.get("tool_calls") or ():
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    return chat


@dataclass(frozen=True, kw_only=True)
class SftData:
    """Rows in an Arrow file, and what became of the trajectories."""

    path: Path
    trajectories: int
    rows: int
    tokens: int
    learnt: int
    """Tokens that carry loss."""
    excluded: Mapping[str, int]
    """Trajectories left out, by reason."""


def write_sft_data(
    trajectories: Iterable[Trajectory],
    tokenizer: Any,
    path: Path,
    *,
    max_length: int | None,
    tools: Sequence[Any] = (),
    source: Source = "auto",
) -> SftData:
    """Write the rows of trajectories to an Arrow file, streaming.

    A trajectory of which any row is longer than `max_length` is left out and counted, never cut: a cut one would
    teach to stop before the answer.

    Raises:
        InputError: nothing is left to learn from.
    """
    import pyarrow

    schema = pyarrow.schema([("input_ids", pyarrow.list_(pyarrow.int32())), ("labels", pyarrow.list_(pyarrow.int32()))])
    excluded: Counter[str] = Counter()
    total = rows_written = tokens = learnt = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, schema) as writer:
        for rows in _usable(trajectories, tokenizer, max_length, tools, source, excluded):
            total += 1
            columns = [[row.input_ids for row in rows], [row.labels for row in rows]]
            arrays = [pyarrow.array(column, schema.field(0).type) for column in columns]
            writer.write_batch(pyarrow.record_batch(arrays, schema=schema))
            rows_written += len(rows)
            tokens += sum(len(row.input_ids) for row in rows)
            learnt += sum(row.learnt for row in rows)
    if not rows_written:
        raise InputError(f"none of the trajectories can be learnt from: {dict(excluded)!r}. Check the store.")
    return SftData(
        path=path, trajectories=total, rows=rows_written, tokens=tokens, learnt=learnt, excluded=dict(excluded)
    )


def _usable(
    trajectories: Iterable[Trajectory],
    tokenizer: Any,
    max_length: int | None,
    tools: Sequence[Any],
    source: Source,
    excluded: Counter[str],
) -> Iterator[tuple[SftRow, ...]]:
    for trajectory in trajectories:
        try:
            rows = sft_rows(trajectory, tokenizer, tools=tools, source=source)
        except InputError as error:
            excluded[_short(str(error))] += 1
            continue
        if max_length is not None and any(len(row.input_ids) > max_length for row in rows):
            excluded[f"longer than {max_length} tokens"] += 1
        elif not any(row.learnt for row in rows):
            excluded["nothing of its own"] += 1
        else:
            yield tuple(row for row in rows if row.learnt)


def _short(message: str) -> str:
    for sign, reason in (("failed", "failed run"), ("images", "has images"), ("no reply", "no reply")):
        if sign in message:
            return reason
    return "template writes replies otherwise" if "chat template" in message else "no usable token ids"


def train_sft(
    model: Any,
    tokenizer: Any,
    data: SftData | Path,
    out: Path,
    settings: SftSettings = SftSettings(),
    *,
    callbacks: Sequence[Any] = (),
    optimizers: tuple[Any, Any] = (None, None),
) -> list[Mapping[str, float]]:
    """Fine-tune, or go on from the last checkpoint; model and tokenizer are saved to `out`, adapters merged.

    Args:
        model: a causal language model; trained in place.
        tokenizer: its tokenizer.
        data: what `write_sft_data` wrote.
        out: the folder; checkpoints are in `out/checkpoints`.
        settings: how.
        callbacks: further transformers callbacks.
        optimizers: another optimizer and schedule than AdamW with a linear decay.

    Returns:
        The log: loss, learning rate and so on by step.
    """
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import SFTTrainer

    rows = Dataset.from_file(str(data.path if isinstance(data, SftData) else data))
    trainer = SFTTrainer(
        model=model, args=_arguments(out, settings), train_dataset=rows, processing_class=tokenizer,
        peft_config=_lora(settings), callbacks=list(callbacks), optimizers=optimizers,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    stopped = last_checkpoint(out / "checkpoints")
    with warnings.catch_warnings():
        # Attention layers of some models are not deterministic on some devices, which torch says at each step.
        warnings.filterwarnings("ignore", category=UserWarning, module="torch.utils.checkpoint")
        trainer.train(resume_from_checkpoint=str(stopped) if stopped else None)
    save_whole(trainer, out)
    tokenizer.save_pretrained(out)
    return [dict(entry) for entry in trainer.state.log_history]


def _arguments(out: Path, settings: SftSettings) -> Any:
    import torch
    from trl import SFTConfig

    cuda = torch.cuda.is_available()
    fields: dict[str, Any] = {
        "output_dir": str(out / "checkpoints"),
        "num_train_epochs": settings.epochs,
        "max_steps": settings.max_steps,
        "learning_rate": settings.learning_rate,
        "per_device_train_batch_size": settings.batch,
        "gradient_accumulation_steps": settings.accumulation,
        "warmup_steps": settings.warmup,  # a share where below 1
        "seed": settings.seed,
        # What is too long was left out when the data was written; here nothing is cut.
        "max_length": None,
        "packing": False,
        "logging_steps": 1,
        "save_steps": settings.checkpoint_every,
        "save_total_limit": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not cuda,
        "bf16": cuda,
        "activation_checkpointing": settings.activation_checkpointing,
        "dataloader_pin_memory": cuda,
    }
    return SFTConfig(**{**fields, **settings.extra})


def _lora(settings: SftSettings) -> Any:
    if not settings.lora:
        return None
    from peft import LoraConfig

    return LoraConfig(r=settings.lora, lora_alpha=2 * settings.lora, target_modules="all-linear", task_type="CAUSAL_LM")
