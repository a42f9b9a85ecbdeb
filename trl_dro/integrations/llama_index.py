# Copyright 2026 The trl_dro Authors. Licensed under the Apache License, Version 2.0.
"""The selector as a LlamaIndex node postprocessor."""

from typing import Any

from ..system.pipeline import RAGPipeline


try:
    from llama_index.core.bridge.pydantic import Field
    from llama_index.core.postprocessor.types import BaseNodePostprocessor
    from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle
except ImportError:
    raise ImportError("the LlamaIndex postprocessor needs its core: pip install 'trl_dro[llama-index]'") from None


class DROPostprocessor(BaseNodePostprocessor):
    """
    Keeps the nodes that the selector picks, in its order.

    Args:
        pipeline ([`~pipeline.RAGPipeline`]):
            System with the selector.
        title_key (`str`, *optional*, defaults to `"title"`):
            Metadata that holds a node's title, if it has one.

    Example:

    ```python
    # needs an index of yours
    from trl_dro import RAGPipeline
    from trl_dro.integrations.llama_index import DROPostprocessor

    selector = DROPostprocessor(pipeline=RAGPipeline.from_pretrained("llama3-dro"))
    engine = index.as_query_engine(similarity_top_k=20, node_postprocessors=[selector])
    ```
    """

    pipeline: RAGPipeline = Field(exclude=True)
    title_key: str = "title"

    @classmethod
    def class_name(cls) -> str:
        return "DROPostprocessor"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        """
        Nodes selected for a query, best first, each with the probability of its choice as score. Those beyond the
        selector's `max_candidates` are not looked at.
        """
        if query_bundle is None:
            raise ValueError("selecting needs the question: pass query_bundle or query_str")
        if not nodes:
            return []
        candidates: list[Any] = []
        for node in nodes:
            title = node.node.metadata.get(self.title_key)
            text = node.node.get_content(metadata_mode=MetadataMode.NONE)
            candidates.append({"title": None if title is None else str(title), "text": text})
        [selection] = self.pipeline.select([query_bundle.query_str], [candidates])
        return [NodeWithScore(node=nodes[chosen.position - 1].node, score=chosen.probability) for chosen in selection]
