/* Everything of libattn. */
#ifndef ATTN_ATTN_H
#define ATTN_ATTN_H

#include <attn/dense.h>
#include <attn/gguf.h>
#include <attn/heads.h>
#include <attn/lab.h>
#include <attn/machine.h>
#include <attn/memory.h>
#include <attn/model.h>
#include <attn/op.h>
#include <attn/plan.h>
#include <attn/policy.h>
#include <attn/safetensors.h>
#include <attn/sample.h>
#include <attn/status.h>
#include <attn/tensor.h>
#include <attn/tokenizer.h>

#endif
