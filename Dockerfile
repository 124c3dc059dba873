# Serves a run directory for ONNX Runtime GenAI on a CPU, with the OpenAI API (docs/serving.md). Not built so far.
FROM python:3.12-slim
COPY dist/nbl_export-*.whl /tmp/
RUN pip install --no-cache-dir "$(echo /tmp/nbl_export-*.whl)[cpu]" 'prism-local[jinja]==0.2.0' \
    && rm /tmp/nbl_export-*.whl && useradd --create-home serve
USER serve
ENV PRISM_MODEL_DIRS=/run-directory
EXPOSE 5272
CMD ["prism", "serve", "--device", "cpu", "--host", "0.0.0.0", "--port", "5272"]
