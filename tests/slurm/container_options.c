/* A stand-in for Pyxis (github.com/NVIDIA/pyxis), for the parsing of its options alone.
 *
 * It makes srun take the container options that our job scripts give, and puts what was given into
 * the environment of each task, where a test can read it. No container is made. Like Pyxis it
 * refuses an empty argument.
 */
#include <slurm/spank.h>
#include <string.h>

SPANK_PLUGIN(container_options, 1);

enum { IMAGE, MOUNTS, NO_HOME, OPTIONS };

static const char *const variables[OPTIONS] = {
	"STAND_IN_IMAGE", "STAND_IN_MOUNTS", "STAND_IN_NO_HOME",
};
static char values[OPTIONS][4096];

static int take(int option, const char *argument, int remote)
{
	if (option == NO_HOME)
		argument = "yes";
	if (argument == NULL || *argument == '\0') {
		slurm_error("container_options: argument required");
		return -1;
	}
	strncpy(values[option], argument, sizeof(values[option]) - 1);
	return 0;
}

struct spank_option spank_options[] = {
	{ "container-image", "IMAGE", "the image", 1, IMAGE, take },
	{ "container-mounts", "SRC:DST[,...]", "bind mounts", 1, MOUNTS, take },
	{ "no-container-mount-home", NULL, "without the home", 0, NO_HOME, take },
	SPANK_OPTIONS_TABLE_END
};

int slurm_spank_task_init(spank_t spank, int argc, char *argv[])
{
	for (int option = 0; option < OPTIONS; option++)
		if (values[option][0] != '\0' &&
		    spank_setenv(spank, variables[option], values[option], 1) != ESPANK_SUCCESS)
			return -1;
	return 0;
}
