"""A merged folder as one GGUF file, and what Ollama needs beside it."""
