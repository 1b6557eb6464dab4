"""Generation engines behind one interface: vLLM, and transformers for what vLLM does not serve."""

from stillhouse.evaluation.engines.base import Completion, GenerationEngine, open_engine

__all__ = ["Completion", "GenerationEngine", "open_engine"]
