"""Seeing inside a model: causal tracing over all tokens and layers."""

from __future__ import annotations

from fastedit.trace.causal import trace_prompts
from fastedit.trace.noise import Noise
from fastedit.trace.options import TraceOptions
from fastedit.trace.prompts import TracePrompt, encode_trace
from fastedit.trace.result import CausalTrace

__all__ = ["CausalTrace", "Noise", "TraceOptions", "TracePrompt", "encode_trace", "trace_prompts"]
