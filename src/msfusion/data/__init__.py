"""Data: loaded, turned into tensors, and shared out among participants."""

from msfusion.data.federated import FederatedData, example_inputs, unigram_perplexity
from msfusion.data.load import load_data
from msfusion.data.spec import DataSpec

__all__ = ["DataSpec", "FederatedData", "example_inputs", "load_data", "unigram_perplexity"]
