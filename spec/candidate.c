/* A candidate for `refmodels verify --exec`, in C: the first steps of OPT, from token ids to the first layer norm.
 *
 *     cc -O2 -o candidate candidate.c -lm
 *     refmodels verify --like PRESET --exec './candidate {checkpoint}'
 *
 * It is run as `candidate CHECKPOINT INPUT OUTPUT`: a directory with the weights as Hugging Face's files, the safetensors file
 * with the inputs, and the one that it is to write. The protocol is in traces.md. float32 alone, and no more checks than it
 * needs: what it cannot do ends it with a line on standard error and exit status 1, which the report shows.
 */

#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EPSILON 1e-5f
#define OFFSET 2 /* the position table of the file has two rows that are never used */

typedef struct {
    long shape[3], rank;
    char type[8];
    const char *bytes;
} Tensor;

static void fail(const char *form, ...)
{
    va_list rest;
    va_start(rest, form);
    vfprintf(stderr, form, rest);
    va_end(rest);
    fputc('\n', stderr);
    exit(1);
}

/* -- safetensors: eight bytes with the length of a JSON header, the header, the values --------------------------------- */

static char *read_file(const char *path)
{
    FILE *file = fopen(path, "rb");
    if (!file || fseek(file, 0, SEEK_END))
        fail("cannot read %s", path);
    long size = ftell(file);
    char *content = malloc(size + 1);
    rewind(file);
    if (!content || size < 8 || fread(content, 1, size, file) != (size_t)size)
        fail("cannot read %s", path);
    fclose(file);
    content[size] = 0;
    return content;
}

/* The tensor of this name. refmodels writes headers without spaces, so a search for "name":{ finds it. */
static Tensor tensor(char *content, const char *name)
{
    Tensor found = {{1, 1, 1}, 0, "", NULL};
    uint64_t length;
    char key[256];
    memcpy(&length, content, 8); /* little-endian, like the machine */
    snprintf(key, sizeof key, "\"%s\":{", name);
    const char *place = strstr(content + 8, key);
    if (!place || place >= content + 8 + length)
        fail("there is no tensor %s", name);
    const char *shape = strstr(place, "\"shape\":["), *offsets = strstr(place, "\"data_offsets\":[");
    const char *type = strstr(place, "\"dtype\":\"");
    long begin;
    if (!shape || !offsets || !type || sscanf(offsets, "\"data_offsets\":[%ld", &begin) != 1
        || sscanf(type, "\"dtype\":\"%7[A-Z0-9]", found.type) != 1)
        fail("the header of %s is not as it should be", name);
    for (shape += 9; *shape != ']' && found.rank < 3; shape += *shape == ',')
        found.shape[found.rank++] = strtol(shape, (char **)&shape, 10);
    found.bytes = content + 8 + length + begin;
    return found;
}

static const float *floats(char *content, const char *name, long rows, long columns)
{
    Tensor found = tensor(content, name);
    if (strcmp(found.type, "F32"))
        fail("%s is %s, and this program computes in F32", name, found.type);
    if ((rows && found.shape[0] != rows) || (columns && found.shape[1] != columns))
        fail("%s has an unexpected shape", name);
    return (const float *)found.bytes;
}

/* Write steps of one shape (b, t, n) or (1, t, n), in the order in which they were computed. */
static void write_steps(const char *path, const char **names, float **values, long (*shapes)[3], int count)
{
    char header[4096] = "{\"__metadata__\":{\"format\":\"refmodels.trace\",\"version\":\"1\",\"order\":\"[";
    char *end = header + strlen(header);
    long offset = 0;
    for (int i = 0; i < count; i++)
        end += sprintf(end, "%s\\\"%s\\\"", i ? "," : "", names[i]);
    end += sprintf(end, "]\"}");
    for (int i = 0; i < count; i++) {
        long bytes = 4 * shapes[i][0] * shapes[i][1] * shapes[i][2];
        end += sprintf(end, ",\"%s\":{\"dtype\":\"F32\",\"shape\":[%ld,%ld,%ld],\"data_offsets\":[%ld,%ld]}",
                       names[i], shapes[i][0], shapes[i][1], shapes[i][2], offset, offset + bytes);
        offset += bytes;
    }
    end += sprintf(end, "}");
    while ((end - header) % 8)
        *end++ = ' ';
    uint64_t length = end - header;
    FILE *file = fopen(path, "wb");
    if (!file || fwrite(&length, 8, 1, file) != 1 || fwrite(header, 1, length, file) != length)
        fail("cannot write %s", path);
    for (int i = 0; i < count; i++) {
        size_t size = shapes[i][0] * shapes[i][1] * shapes[i][2];
        if (fwrite(values[i], 4, size, file) != size)
            fail("cannot write %s", path);
    }
    if (fclose(file))
        fail("cannot write %s", path);
}

/* -- the model: x = E[token] + P[position], then a layer norm ---------------------------------------------------------- */

static void layer_norm(float *out, const float *x, const float *gamma, const float *beta, long n)
{
    double mean = 0, variance = 0;
    for (long i = 0; i < n; i++)
        mean += x[i];
    mean /= n;
    for (long i = 0; i < n; i++)
        variance += (x[i] - mean) * (x[i] - mean);
    double scale = 1 / sqrt(variance / n + EPSILON);
    for (long i = 0; i < n; i++)
        out[i] = (float)((x[i] - mean) * scale) * gamma[i] + beta[i];
}

int main(int argc, char **argv)
{
    if (argc != 4)
        fail("usage: candidate CHECKPOINT INPUT OUTPUT");
    char path[4096];
    snprintf(path, sizeof path, "%s/model.safetensors", argv[1]);
    char *weights = read_file(path), *given = read_file(argv[2]);

    Tensor ids = tensor(given, "in.token_ids"), table = tensor(weights, "model.decoder.embed_tokens.weight");
    if (strcmp(ids.type, "I64") || ids.rank != 2)
        fail("in.token_ids is to be I64 of two axes");
    long b = ids.shape[0], t = ids.shape[1], n = table.shape[1];
    const float *tokens = floats(weights, "model.decoder.embed_tokens.weight", 0, n);
    const float *positions = floats(weights, "model.decoder.embed_positions.weight", 0, n) + OFFSET * n;
    const float *gamma = floats(weights, "model.decoder.layers.0.self_attn_layer_norm.weight", n, 0);
    const float *beta = floats(weights, "model.decoder.layers.0.self_attn_layer_norm.bias", n, 0);

    float *token = malloc(4 * b * t * n), *x = malloc(4 * b * t * n), *h = malloc(4 * b * t * n);
    if (!token || !x || !h)
        fail("not enough memory");
    for (long i = 0; i < b * t; i++) {
        int64_t id;
        memcpy(&id, ids.bytes + 8 * i, 8);
        memcpy(token + i * n, tokens + id * n, 4 * n);
        for (long j = 0; j < n; j++)
            x[i * n + j] = token[i * n + j] + positions[i % t * n + j];
        layer_norm(h + i * n, x + i * n, gamma, beta, n);
    }

    const char *names[] = {"token_embedding:embedding", "position_embedding:embedding", "opt_backbone:add",
                           "layers.0.self_attention_layer_norm:layer_norm"};
    float *values[] = {token, (float *)positions, x, h};
    long shapes[][3] = {{b, t, n}, {1, t, n}, {b, t, n}, {b, t, n}};
    write_steps(argv[3], names, values, shapes, 4);
    return 0;
}
