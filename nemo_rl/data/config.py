"""The `data` section of a configuration."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator

from nemo_rl.utils.config import ConfigModel


class RecordsConfig(ConfigModel):
    """Where records come from."""

    path: str | None = Field(
        None, description="JSONL or Parquet file, or a Hugging Face data set (local directory or hub name)."
    )
    kind: str = Field("auto", description="auto (by path), jsonl, parquet or huggingface.")
    split: str | None = Field(None, description="Split of a Hugging Face data set.")
    name: str | None = Field(None, description="Configuration name of a Hugging Face data set.")


class DatasetConfig(RecordsConfig):
    """Where problems come from. Without a path: the embedded generator of arithmetic problems."""

    kind: str = Field(
        "auto", description="auto (by path), arithmetic, seeds, jsonl, parquet, huggingface, or a registered name."
    )
    prompt_key: str = Field("problem", description="Column with the prompt: text, or a list of chat messages.")
    answer_key: str = Field("answer", description="Column with the expected answer.")
    answer_pattern: str | None = Field(
        None, description="Regular expression whose first group is the answer within that column. Null: the full text."
    )
    max_num_problems: int | None = Field(None, ge=1, description="Use only the first N problems.")

    @field_validator("answer_pattern")
    @classmethod
    def _has_a_group(cls, pattern: str | None) -> str | None:
        if pattern is None:
            return None
        try:
            groups = re.compile(pattern).groups
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
        if not groups:
            raise ValueError(f"{pattern!r} has no group; put parentheses around the answer, as in '#### (.+)'")
        return pattern


class ArithmeticConfig(ConfigModel):
    """The embedded data set: seeded arithmetic problems of graded difficulty, disjoint train and validation splits."""

    seed: int = Field(0, description="Seed of the problem order.")
    levels: list[int] = Field(
        default=[1], min_length=1, description="Difficulty levels to draw from (1 is the easiest)."
    )
    num_train: int = Field(4096, ge=1, description="Problems in the train split.")
    num_validation: int = Field(256, ge=1, description="Problems in the validation split.")


class DataConfig(ConfigModel):
    """Training and validation data, and how prompts are formatted."""

    train: DatasetConfig = Field(default_factory=DatasetConfig)
    validation: DatasetConfig | None = Field(
        None, description="Validation data. Null: the generator's validation split, or none when train has a path."
    )
    arithmetic: ArithmeticConfig = Field(default_factory=ArithmeticConfig)
    shuffle: bool = Field(True, description="Shuffle the train problems in every epoch.")
    max_prompt_length: int = Field(64, ge=1, description="Longest prompt in tokens.")
    overlong_prompts: Literal["error", "drop"] = Field(
        "error", description="What to do with a prompt that is longer than max_prompt_length."
    )
    prompt_template: str | None = Field(
        None,
        description="Template for text prompts: text that contains {problem}, or the path of a file with such text.",
    )
    system_prompt: str | None = Field(None, description="System message (chat models only).")
    keep_thinking: bool = Field(
        False,
        description="Accept a chat template that removes the thinking of earlier turns; transcripts keep it, as it was "
        "sampled.",
    )
    apply_chat_template: bool = Field(True, description="Use the tokenizer's chat template if it has one.")


class ConversationsConfig(RecordsConfig):
    """Where conversations come from. Without a path: the embedded generator of dialogues."""

    kind: str = Field(
        "auto", description="auto (by path), dialogues, jsonl, parquet, huggingface, or package.module:Class."
    )
    messages_key: str = Field("messages", description="Column with a conversation: a list of chat messages.")
    prompt_key: str = Field(
        "prompt",
        description="Column with a prompt: text, or a list of chat messages. Read if there is no messages_key.",
    )
    completion_key: str = Field("completion", description="Column with its completion, in the form of the prompt.")
    tools_key: str = Field(
        "tools", description="Column with the JSON schemas of tools, which the chat template shows. It may be absent."
    )
    max_num_records: int | None = Field(None, ge=1, description="Use only the first N records.")


class PreferencesConfig(RecordsConfig):
    """Where preference pairs come from. Without a path: the embedded generator of dialogues."""

    kind: str = Field(
        "auto", description="auto (by path), dialogues, jsonl, parquet, huggingface, or package.module:Class."
    )
    prompt_key: str | None = Field(
        "prompt",
        description="Column with a prompt: text, or a list of chat messages. Null, or a record without it: the "
        "messages that both conversations begin with.",
    )
    chosen_key: str = Field(
        "chosen",
        description="Column with the better answer, in the form of the prompt; without a prompt, with a conversation.",
    )
    rejected_key: str = Field("rejected", description="Column with the worse answer, in the form of the better one.")
    margin_key: str = Field(
        "margin", description="Column with how much better the answer is, for reward models. It may be absent."
    )
    tools_key: str = Field(
        "tools", description="Column with the JSON schemas of tools, which the chat template shows. It may be absent."
    )
    max_num_records: int | None = Field(None, ge=1, description="Use only the first N records.")


class ChatDataConfig(ConfigModel):
    """How conversations become tokens, and which of the tokens are in the loss."""

    shuffle: bool = Field(True, description="Shuffle the records in every epoch.")
    loss_on: Literal["assistant_turns", "last_turn"] = Field(
        "assistant_turns",
        description="Turns in the loss: all of the assistant (of a completion, if there is one), or the last of them.",
    )
    mask: Literal["auto", "markers", "rendering"] = Field(
        "auto",
        description="How the assistant's tokens are found: by the {% generation %} markers of the chat template, or by "
        "rendering the conversation up to each turn. auto: by markers if the template has them.",
    )
    overlong: Literal["error", "drop", "truncate"] = Field(
        "error", description="What to do with a record of more than policy.max_sequence_length tokens."
    )
    system_prompt: str | None = Field(None, description="System message of conversations that have none.")
    apply_chat_template: bool = Field(
        True, description="Render prompts and completions that are text as chat messages, if there is a chat template."
    )


class SFTDataConfig(ChatDataConfig):
    """Training and validation data of supervised fine-tuning, and which tokens are in the loss."""

    train: ConversationsConfig = Field(default_factory=ConversationsConfig)
    validation: ConversationsConfig | None = Field(
        None, description="Validation data. Null: other dialogues of the generator, or none when train has a path."
    )


class PreferenceDataConfig(ChatDataConfig):
    """Training and validation pairs, and how they become tokens."""

    train: PreferencesConfig = Field(default_factory=PreferencesConfig)
    validation: PreferencesConfig | None = Field(
        None, description="Validation data. Null: other pairs of the generator, or none when train has a path."
    )
