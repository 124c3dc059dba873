/* ONNX Runtime GenAI through its C interface: genai_c DIR NEW_TOKENS ID ID ...  ->  one line of JSON.
 * The wheel carries the library without its header, so what is used of ort_genai_c.h is declared here. */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

typedef struct OgaResult OgaResult;
typedef struct OgaModel OgaModel;
typedef struct OgaGeneratorParams OgaGeneratorParams;
typedef struct OgaGenerator OgaGenerator;
const char *OgaResultGetError(const OgaResult *);
OgaResult *OgaCreateModel(const char *, OgaModel **);
OgaResult *OgaCreateGeneratorParams(const OgaModel *, OgaGeneratorParams **);
OgaResult *OgaGeneratorParamsSetSearchNumber(OgaGeneratorParams *, const char *, double);
OgaResult *OgaCreateGenerator(const OgaModel *, const OgaGeneratorParams *, OgaGenerator **);
OgaResult *OgaGenerator_AppendTokens(OgaGenerator *, const int32_t *, size_t);
OgaResult *OgaGenerator_GenerateNextToken(OgaGenerator *);
bool OgaGenerator_IsDone(OgaGenerator *);
OgaResult *OgaGenerator_GetNextTokens(const OgaGenerator *, const int32_t **, size_t *);
void OgaDestroyGenerator(OgaGenerator *);
void OgaDestroyGeneratorParams(OgaGeneratorParams *);
void OgaDestroyModel(OgaModel *);
void OgaShutdown(void);

static void check(const OgaResult *result) {
  if (result == NULL) return;
  fprintf(stderr, "%s\n", OgaResultGetError(result));
  exit(1);
}

int main(int argc, char **argv) {
  if (argc < 4) return 2;
  const size_t prompt = (size_t)argc - 3;
  int32_t *ids = malloc(prompt * sizeof *ids);
  for (size_t i = 0; i < prompt; i++) ids[i] = atoi(argv[i + 3]);
  OgaModel *model;
  OgaGeneratorParams *params;
  OgaGenerator *generator;
  check(OgaCreateModel(argv[1], &model));
  check(OgaCreateGeneratorParams(model, &params));
  check(OgaGeneratorParamsSetSearchNumber(params, "max_length", (double)prompt + atoi(argv[2])));
  check(OgaCreateGenerator(model, params, &generator));
  check(OgaGenerator_AppendTokens(generator, ids, prompt));
  printf("{\"tokens\": [");
  for (const char *comma = ""; !OgaGenerator_IsDone(generator); comma = ", ") {
    const int32_t *next;
    size_t count;
    check(OgaGenerator_GenerateNextToken(generator));
    check(OgaGenerator_GetNextTokens(generator, &next, &count)); /* the sequence leaves the end of text out */
    printf("%s%d", comma, next[0]);
  }
  printf("]}\n");
  OgaDestroyGenerator(generator);
  OgaDestroyGeneratorParams(params);
  OgaDestroyModel(model);
  OgaShutdown();
  free(ids);
  return 0;
}
