"""From batches to answers: ingest, store, queries, metrics, the live page."""
