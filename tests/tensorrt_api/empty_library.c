/* TensorRT without content: what the bindings need to be loaded, and an answer of nothing to every call.

   An object of the library begins with a table of functions and a pointer to its implementation, which begins with
   such a table too. Here both are one object. Its functions answer with the object while objects are being made, and
   with 0 afterwards: false, null or zero, as the library does when a call fails. */

#include <stddef.h>

extern char _ZTIv[]; /* any type's information; the bindings look at it before they hand out an object */

enum { FUNCTIONS = 512 };
static struct {
    ptrdiff_t offset;
    void *type;
    void *functions[FUNCTIONS];
} table = {0, _ZTIv, {0}};
static struct {
    void *functions;
    void *implementation;
} object;
static void *answer;

static void *call(void) { return answer; }

void answer_with_objects(int objects)
{
    for (int i = 0; i < FUNCTIONS; i++)
        table.functions[i] = (void *) call;
    object.functions = table.functions;
    object.implementation = &object;
    answer = objects ? (void *) &object : 0;
}

void *createInferBuilder_INTERNAL(void) { return answer; }
void *createInferRefitter_INTERNAL(void) { return answer; }
void *createInferRuntime_INTERNAL(void) { return answer; }
void *createNvOnnxParser_INTERNAL(void) { return answer; }
void *createNvOnnxParserRefitter_INTERNAL(void) { return answer; }
void *getBuilderPluginRegistry(void) { return answer; }
void *getPluginRegistry(void) { return answer; }
int getNvOnnxParserVersion(void) { return 0; }
int initLibNvInferPlugins(void) { return 0; }
