SELECT convert_to(version_num, 'UTF8') FROM saga_store_version
