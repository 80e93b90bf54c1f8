// The number of launches of a library, which a test reads by ctypes.
#pragma once

static long launches = 0;

extern "C" long null_launches() { return launches; }
