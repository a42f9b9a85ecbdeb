# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""The selector as a LangChain document compressor."""

from collections.abc import Sequence
from typing import Any

from ..system.pipeline import RAGPipeline


try:
    from langchain_core.callbacks import Callbacks
    from langchain_core.documents import BaseDocumentCompressor, Document
except ImportError:
    raise ImportError("the LangChain compressor needs langchain-core: pip install 'trl_dro[langchain]'") from None


class DROCompressor(BaseDocumentCompressor):
    """
    Keeps the documents that the selector picks, in its order.

    Args:
        pipeline ([`~pipeline.RAGPipeline`]):
            System with the selector.
        title_key (`str`, *optional*, defaults to `"title"`):
            Metadata that holds a document's title, if it has one.

    Example:

    ```python
    # needs langchain-classic, and a retriever of yours
    from langchain_classic.retrievers import ContextualCompressionRetriever
    from trl_dro import RAGPipeline
    from trl_dro.integrations.langchain import DROCompressor

    compressor = DROCompressor(pipeline=RAGPipeline.from_pretrained("llama3-dro"))
    retriever = ContextualCompressionRetriever(base_compressor=compressor, base_retriever=your_retriever)
    ```
    """

    model_config = {"arbitrary_types_allowed": True}

    pipeline: RAGPipeline
    title_key: str = "title"

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """
        Documents selected for a query, best first, each with the probability of its choice as `relevance_score` in
        its metadata. Those beyond the selector's `max_candidates` are not looked at.
        """
        if not documents:
            return []
        candidates: list[Any] = [
            {"title": _text(d.metadata.get(self.title_key)), "text": d.page_content} for d in documents
        ]
        [selection] = self.pipeline.select([query], [candidates])
        return [
            documents[chosen.position - 1].model_copy(
                update={"metadata": {**documents[chosen.position - 1].metadata, "relevance_score": chosen.probability}}
            )
            for chosen in selection
        ]


def _text(value: object) -> str | None:
    return None if value is None else str(value)
